"""AVQCodebook: straight-through, known answers of EMA, usage and perplexity, start and revival."""

import math

import pytest
import torch
import torch.nn.functional as F

from cortexicon.modeling.code_search_avq import nearest_code, spherical_kmeans
from cortexicon.modeling.quantization_avq import AVQCodebook, straight_through


def codebook_of(rows, decay=0.5, threshold=0.1, interval=10**6):
    """A started codebook in training mode that holds `rows`, each with count 1."""
    book = AVQCodebook(len(rows), rows.shape[1], decay, threshold, interval).train()
    book.codebook.copy_(rows)
    book.code_sum.copy_(rows)
    book.code_count.fill_(1.0)
    book.initialized.fill_(True)
    return book


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_straight_through_passes_gradient_one():
    continuous = torch.randn(4, 3, requires_grad=True)
    quantized = torch.randn(4, 3, requires_grad=True)
    value = straight_through(continuous, quantized)
    torch.testing.assert_close(value, quantized)
    upstream = torch.randn(4, 3)
    value.backward(upstream)
    assert torch.equal(continuous.grad, upstream)
    assert quantized.grad is None


def test_the_gradient_at_the_quantised_latent_is_that_of_the_latent():
    book = codebook_of(unit(8, 5)).eval()
    latents = torch.randn(2, 6, 5, requires_grad=True)
    upstream = torch.randn(2, 6, 5)
    (book(latents).quantized * upstream).sum().backward()
    through = latents.grad.clone()
    latents.grad = None
    (F.normalize(latents, dim=-1) * upstream).sum().backward()
    assert torch.equal(through, latents.grad)
    assert through.abs().max() > 0


def test_the_code_is_the_nearest_one():
    rows, vectors = unit(50, 4), unit(300, 4, seed=1)
    expected = torch.cdist(vectors.double(), rows.double()).argmin(-1)
    assert torch.equal(nearest_code(vectors, rows), expected)


def test_encoding_is_what_the_forward_chooses():
    book = codebook_of(unit(50, 4)).eval()
    latents = 3.0 * torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1))
    codes = book.encode(latents)
    assert codes.shape == (2, 7)
    assert torch.equal(codes, book(latents).codes)
    assert len(codes.unique()) > 3


def test_commitment_is_the_squared_distance_to_the_code():
    book = codebook_of(torch.eye(2)).eval()
    angle = math.radians(30)
    latents = torch.tensor([[[math.cos(angle), math.sin(angle)], [0.0, 5.0]]])  # 2nd: on its code
    output = book(latents)
    assert output.codes.tolist() == [[0, 1]]
    assert output.commitment_loss.item() == pytest.approx((2 - 2 * math.cos(angle)) / 2, abs=1e-6)
    masked = book(latents, torch.tensor([[True, False]]))
    assert masked.commitment_loss.item() == pytest.approx(2 - 2 * math.cos(angle), abs=1e-6)


@pytest.mark.parametrize(
    ("codes", "perplexity"),
    [([0, 0, 0, 0], 1.0), ([0, 1, 2, 3], 4.0), ([0, 0, 1, 1], 2.0), ([0, 0, 0, 1], 1.7548)],
)
def test_perplexity_is_exp_of_the_entropy(codes, perplexity):
    book = codebook_of(torch.eye(4)).eval()
    output = book(torch.eye(4)[torch.tensor([codes])])
    assert output.codes.tolist() == [codes]
    assert output.perplexity.item() == pytest.approx(perplexity, abs=1e-3)


def test_usage_counts_codes_above_the_threshold():
    book = codebook_of(torch.eye(4), threshold=0.1)
    book.code_count.copy_(torch.tensor([3.0, 0.99, 0.01, 0.0]))  # mean 1, threshold 0.1
    assert book.usage().item() == 0.5


def test_the_ema_update_has_its_known_answer():
    book = codebook_of(torch.eye(3), decay=0.75)
    # The first is (.8, .6, 0) at unit length, nearest to code 0.
    latents = torch.tensor([[[4.0, 3.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]])
    output = book(latents)
    assert output.codes.tolist() == [[0, 1, 0]]
    torch.testing.assert_close(book.code_count, torch.tensor([1.25, 1.0, 0.75]))
    sums = torch.tensor([[0.75 + 0.25 * 1.8, 0.25 * 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.75]])
    torch.testing.assert_close(book.code_sum, sums)
    torch.testing.assert_close(book.codebook, F.normalize(sums, dim=-1))
    assert book.updates == 1


def test_masked_tokens_move_nothing():
    book, twin = codebook_of(unit(6, 3)), codebook_of(unit(6, 3))
    latents = unit(2, 4, 3, seed=2)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    book(latents, mask)
    other = latents.clone()
    other[~mask] = unit(3, 3, seed=9)
    twin(other, mask)
    assert torch.equal(book.code_sum, twin.code_sum)
    assert book.code_count.sum().item() == pytest.approx(0.5 * 6 + 0.5 * 5)


def test_evaluation_leaves_the_codebook_alone():
    book = codebook_of(unit(6, 3)).eval()
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book(unit(2, 4, 3, seed=2))
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())


def test_all_state_is_saved():
    book = codebook_of(unit(6, 3))
    assert dict(book.named_buffers()).keys() == book.state_dict().keys()
    assert not list(book.parameters())
    assert set(book.state_dict()) == {
        "codebook",
        "code_sum",
        "code_count",
        "updates",
        "initialized",
    }


def test_kmeans_finds_the_clusters():
    centres = F.normalize(
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [-1.0, 0, 0]]), dim=1
    )
    noise = 0.05 * torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(4))
    vectors = F.normalize(centres[:, None] + noise, dim=-1).flatten(0, 1)
    found = [spherical_kmeans(vectors, 4, seed=seed) for seed in range(5)]  # some start badly
    errors = [(centres - codes[nearest_code(centres, codes)]).norm() for codes in found]
    assert min(errors) < 0.1


def test_kmeans_of_fewer_vectors_than_codes_gives_distinct_unit_codes():
    found = spherical_kmeans(unit(5, 4), 12)
    assert found.shape == (12, 4)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(12))
    assert len(found.unique(dim=0)) == 12


def test_the_start_places_codes_where_data_are():
    book = AVQCodebook(16, 4, 0.99, 0.1, 20)
    vectors = 3.0 * unit(400, 4)
    before = book(vectors[None])
    assert before.commitment_loss == 0  # nothing is quantised before the start
    torch.testing.assert_close(before.quantized[0], F.normalize(vectors, dim=-1))
    book.start(vectors, seed=1)
    random = AVQCodebook(16, 4, 0.99, 0.1, 20)
    random.codebook.copy_(unit(16, 4, seed=5))
    random.initialized.fill_(True)
    started, at_random = book.eval()(vectors[None]), random.eval()(vectors[None])
    assert bool(book.initialized)
    assert started.commitment_loss < 0.8 * at_random.commitment_loss
    torch.testing.assert_close(book.codebook.norm(dim=-1), torch.ones(16))


def revive(latents, mask=None, dead=(0, 1, 2), decay=0.9):
    """Run the one update that revives codes `dead` of 8; returns the codebook and that batch."""
    book = codebook_of(unit(8, 4), decay=decay, threshold=0.2, interval=1)
    book.code_count[list(dead)] = 0.0
    book.code_sum[list(dead)] = 0.0
    # Dead codes lie opposite to all data, so that no vector chooses them.
    book.codebook[list(dead)] = -F.normalize(latents.flatten(0, 1).mean(0), dim=-1)
    book(latents, mask)
    return book


@pytest.fixture
def cone():
    """Float32 (9 scans, 7 tokens, 4): unit vectors around one direction."""
    return F.normalize(unit(9, 7, 4, seed=3) + torch.tensor([2.0, 0, 0, 0]), dim=-1)


def test_revived_codes_keep_their_reset_over_the_next_update(cone):
    book = revive(cone)
    revived = book.codebook[:3].clone()
    mean = book.code_count[0].item()
    assert mean > 0
    assert (book.code_count[:3] == mean).all()
    torch.testing.assert_close(book.code_sum[:3], revived * mean)
    book.revival_interval = 10**6
    away = -cone[:2]  # data that chooses none of them
    book(away)
    assert not torch.isin(book(away).codes, torch.arange(3)).any()
    torch.testing.assert_close(book.code_count[:3], torch.full((3,), mean * 0.9**2))
    torch.testing.assert_close(book.codebook[:3], revived)
    book(cone)  # and data near them now uses them
    assert torch.isin(nearest_code(cone.flatten(0, 1), book.codebook), torch.arange(3)).any()


def sources_of(code, latents, mask):
    """The sets of three scans, one vector of each, whose normalised mean is `code`."""
    pool = latents.flatten(0, 1)
    owner = torch.arange(len(latents)).repeat_interleave(latents.shape[1])
    index = torch.combinations(torch.arange(len(pool))[mask.flatten()], 3)
    means = F.normalize(pool[index].sum(1), dim=-1)
    hits = index[(means - code).norm(dim=-1) < 1e-6]
    return [set(owner[row].tolist()) for row in hits]


@pytest.mark.parametrize("scans", [range(9), [0, 3, 6, 1, 4, 7], [0, 1, 2, 3, 4, 6], range(3, 9)])
def test_a_revived_code_is_a_mean_over_several_scans(cone, scans):
    # NOTE: scans without a valid token must not upset the choice, whatever their numbers are.
    mask = torch.zeros(9, 7, dtype=torch.bool)
    mask[list(scans)] = True
    assert_means_of_three(cone, mask)


def test_gaps_in_the_numbering_of_scans_do_not_matter():
    cone = F.normalize(unit(16, 4, 4, seed=6) + torch.tensor([2.0, 0, 0, 0]), dim=-1)
    mask = torch.zeros(16, 4, dtype=torch.bool)
    mask[[0, 3, 6, 9, 12, 15]] = True  # all in one group of three, by their old numbers
    assert_means_of_three(cone, mask)


def assert_means_of_three(latents, mask):
    book = revive(latents, mask)
    single = torch.cdist(book.codebook[:3], latents.flatten(0, 1))
    assert single.min() > 1e-4  # nobody's own vector
    for code in book.codebook[:3]:
        sets = sources_of(code, latents, mask)
        assert sets
        assert any(len(scans) == 3 for scans in sets)


def test_too_few_scans_revive_nothing(cone):
    book = revive(cone[:5])
    assert (book.code_count[:3] == 0).all()


def test_revival_comes_at_its_interval(cone):
    book = codebook_of(unit(8, 4), threshold=0.2, interval=3, decay=0.0)
    book.codebook[0] = -cone.flatten(0, 1).mean(0)
    alive = []
    for _ in range(6):
        book(cone)
        alive.append(bool(book.code_count.min() > 0))
    assert alive[:3] == [False, False, True]
    assert alive[5]
