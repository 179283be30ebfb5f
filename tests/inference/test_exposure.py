"""A code that is one person's latent is found, and blurred until it is nobody's."""

import torch
import torch.nn.functional as F

from cortexicon.inference.exposure import (
    COSINE,
    SUBJECTS,
    TrainingLatents,
    blur_exposed,
    find_exposed,
)
from cortexicon.modeling.quantization_avq import AVQCodebook

PEOPLE, EACH, WIDTH, CODES = 40, 10, 8, 6


def codebook_and_latents(seed=0):
    """Latents of 40 people, and codes far from any single one."""
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(PEOPLE * EACH, WIDTH, generator=generator), dim=-1)
    owners = torch.arange(PEOPLE).repeat_interleave(EACH)
    codebook = AVQCodebook(CODES, WIDTH, 0.99, 0.1, 20)
    codebook.start(vectors)
    return codebook, TrainingLatents(vectors, owners, PEOPLE)


def plant(codebook, latents, code=3):
    """Person 7 gets a latent that nobody else's comes near, and a code that is it."""
    alone = F.normalize(torch.full((WIDTH,), -1.0) + 0.1 * torch.arange(WIDTH), dim=0)
    far = latents.vectors @ alone < 0.2
    vectors = torch.cat([latents.vectors[far], alone[None]])
    owners = torch.cat([latents.owners[far], torch.tensor([7])])
    codebook.codebook[code] = alone
    return TrainingLatents(vectors, owners, PEOPLE)


def test_means_over_many_are_not_exposed():
    codebook, latents = codebook_and_latents()
    found = find_exposed(codebook, latents)
    assert found.exposed == []
    assert found.highest_cosine < COSINE
    assert (found.num_codes, found.num_latents, found.num_subjects) == (CODES, 400, PEOPLE)


def test_a_copy_of_one_latent_is_found_and_blurred():
    codebook, latents = codebook_and_latents()
    latents = plant(codebook, latents)
    before = codebook.codebook.clone()
    found = find_exposed(codebook, latents)
    assert found.exposed == [3]
    assert found.fewest_subjects < SUBJECTS

    assert blur_exposed(codebook, latents) == [3]
    assert find_exposed(codebook, latents).exposed == []
    kept = [code for code in range(CODES) if code != 3]
    assert torch.equal(codebook.codebook[kept], before[kept])
    torch.testing.assert_close(codebook.codebook.norm(dim=-1), torch.ones(CODES))


def test_a_latent_that_many_share_gives_nobody_away():
    codebook, latents = codebook_and_latents()
    shared = codebook.codebook[2].clone()
    vectors = torch.cat([latents.vectors, shared.expand(SUBJECTS, -1)])
    owners = torch.cat([latents.owners, torch.arange(SUBJECTS)])
    found = find_exposed(codebook, TrainingLatents(vectors, owners, PEOPLE))
    assert found.highest_cosine > COSINE
    assert found.exposed == []


def test_people_count_for_the_codes_that_the_search_gives_them():
    _, latents = codebook_and_latents()
    codebook = AVQCodebook(48, WIDTH, 0.99, 0.1, 20, branches=12)
    generator = torch.Generator().manual_seed(4)
    codebook.codebook.copy_(F.normalize(torch.randn(48, WIDTH, generator=generator), dim=-1))
    codes = codebook.search(latents.vectors)
    nearest = (latents.vectors @ codebook.codebook.T).argmax(1)
    assert not torch.equal(codes, nearest)
    people = [len(latents.owners[codes == code].unique()) for code in codes.unique()]
    assert find_exposed(codebook, latents).fewest_subjects == min(people)
