"""A codebook in branches: the search, the start, revival within a branch, several processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from cortexicon.modeling import ConfigurationError, code_search_avq
from cortexicon.modeling.code_search_avq import halved, nearest_branches, nearest_code
from cortexicon.modeling.quantization_avq import AVQCodebook

BRANCHES, SIZE, WIDTH = 8, 5, 4
CODES = BRANCHES * SIZE
SCANS, TOKENS = 9, 20


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def new_book(decay=0.9, threshold=0.2, interval=10**6, **more):
    return AVQCodebook(CODES, WIDTH, decay, threshold, interval, branches=BRANCHES, **more).train()


def started(**more):
    book = new_book(**more)
    book.start(unit(400, WIDTH, seed=5))
    return book


def searched(vectors, codebook):
    """The definition, in float64: the four branches with the nearest means, then their codes."""
    branches = codebook.double().view(BRANCHES, SIZE, WIDTH)
    middles = torch.cdist(vectors.double(), F.normalize(branches.mean(1), dim=-1))
    seen = torch.zeros(len(vectors), BRANCHES, dtype=torch.bool)
    seen.scatter_(1, middles.topk(4, largest=False).indices, True)
    distances = torch.cdist(vectors.double(), codebook.double())
    return distances.masked_fill(~seen.repeat_interleave(SIZE, 1), 9.0).argmin(-1)


def test_the_search_takes_the_nearest_code_of_the_four_nearest_branches():
    book = new_book()
    book.codebook.copy_(unit(CODES, WIDTH))  # no order: the nearest code is often elsewhere
    vectors = unit(500, WIDTH, seed=1)
    codes = book.search(vectors)
    assert torch.equal(codes, searched(vectors, book.codebook))
    everywhere = torch.cdist(vectors, book.codebook).argmin(-1)
    assert 0.5 < (codes == everywhere).float().mean() < 0.9
    book.initialized.fill_(True)
    assert torch.equal(book.encode(vectors[None])[0], codes)
    assert torch.equal(book.eval()(vectors[None]).codes[0], codes)


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_few_branches_are_all_looked_at(branches):
    codebook, vectors = unit(CODES, WIDTH), unit(500, WIDTH, seed=1)
    everywhere = torch.cdist(vectors.double(), codebook.double()).argmin(-1)
    assert torch.equal(nearest_code(vectors, codebook, branches), everywhere)


def test_after_the_start_the_nearest_code_of_all_is_hardly_ever_missed():
    book, vectors = started(), unit(2000, WIDTH, seed=1)
    codes = book.search(vectors)
    assert len(codes.unique()) == CODES
    everywhere = torch.cdist(vectors, book.codebook).argmin(-1)
    assert (codes == everywhere).float().mean() > 0.97


def test_a_code_does_not_depend_on_who_shares_the_batch():
    book, vectors = started(), unit(300, WIDTH, seed=1)
    for branches in (1, BRANCHES):
        book.branches = branches
        alone = torch.cat([book.search(vector[None]) for vector in vectors])
        assert torch.equal(book.search(vectors), alone)


def test_accelerators_take_another_way_to_the_same_codes():
    codebook, vectors = unit(BRANCHES, SIZE, WIDTH), unit(3000, WIDTH, seed=2)
    near = code_search_avq.nearest_branches(vectors, codebook, 4)
    found = code_search_avq._nearest_of_own(vectors, near, codebook)
    assert torch.equal(found, nearest_code(vectors, codebook.flatten(0, 1), BRANCHES))


@pytest.mark.parametrize(("rows", "parts"), [(60, 6), (64, 8), (35, 7), (9, 1)])
def test_halves_hold_as_many_rows_each_that_lie_together(rows, parts):
    vectors = unit(rows, WIDTH)
    found = halved(vectors, parts)
    assert [len(part) for part in found] == [rows // parts] * parts
    assert torch.cat(found).sort().values.equal(torch.arange(rows))
    spread = sum(float((vectors[p] - vectors[p].mean(0)).square().sum()) for p in found)
    if parts > 1:
        assert spread < 0.7 * float((vectors - vectors.mean(0)).square().sum())


@pytest.mark.parametrize("vectors", [400, 20, 3])
def test_the_start_gives_every_branch_distinct_codes(vectors):
    book = new_book()
    book.start(unit(vectors, WIDTH))
    assert len(book.codebook.unique(dim=0)) == CODES
    torch.testing.assert_close(book.codebook.norm(dim=-1), torch.ones(CODES))


def test_the_start_is_about_as_near_to_data_as_one_that_compares_all():
    vectors = unit(2000, WIDTH, seed=7)
    losses = []
    for book in (new_book(), AVQCodebook(CODES, WIDTH, 0.9, 0.2, 10**6)):
        book.start(vectors)
        losses.append(float(book.eval()(vectors[None]).commitment_loss))
    assert losses[0] < 1.05 * losses[1]


def test_the_update_counts_what_the_search_chose():
    book = started(decay=0.0)
    vectors = unit(SCANS, TOKENS, WIDTH, seed=3)
    expected = book.search(vectors.flatten(0, 1))
    book(vectors)
    assert torch.equal(book.code_count, torch.bincount(expected, minlength=CODES).float())
    sums = torch.zeros(CODES, WIDTH).index_add_(0, expected, vectors.flatten(0, 1))
    torch.testing.assert_close(book.code_sum, sums)


def kill(book, codes):
    book.code_count[codes] = 0.0
    book.code_sum[codes] = 0.0


def test_a_dead_code_comes_back_in_its_own_branch():
    book = started(interval=1, decay=0.99)
    vectors = unit(SCANS, TOKENS, WIDTH, seed=3)
    dead = torch.tensor([1, 7, 8, 22])
    kill(book, dead)
    own = book.codebook.view(BRANCHES, SIZE, WIDTH)
    order = torch.arange(SCANS * TOKENS)
    codes, rows = book._anchors(dead, vectors.flatten(0, 1), order)
    branch = nearest_branches(vectors.flatten(0, 1), own, 1)[0]
    assert torch.equal(codes, dead)
    assert torch.equal(codes // SIZE, branch[rows])
    assert len(rows.unique()) == len(rows)
    assert rows[1] == (branch == 1).nonzero()[0]  # the first in the order
    before = book.codebook.clone()
    book(vectors)
    assert (book.codebook[dead] - before[dead]).norm(dim=-1).min() > 1e-3
    used = [int((book.search(vectors.flatten(0, 1)) == code).sum()) for code in dead]
    assert sum(count > 0 for count in used) >= 3


def test_a_deserted_branch_comes_back():
    book = started(interval=1, decay=0.99)
    vectors = F.normalize(unit(SCANS, TOKENS, WIDTH, seed=3) + torch.tensor([1.5, 0, 0, 0]), dim=-1)
    far = torch.arange(SIZE)
    book.codebook[far] = F.normalize(
        torch.tensor([-1.0, 0, 0, 0]) + 0.1 * unit(SIZE, WIDTH, seed=8), dim=-1
    )
    kill(book, far)
    assert not (book.search(vectors.flatten(0, 1)) < SIZE).any()
    book(vectors)
    assert (book.search(vectors.flatten(0, 1)) < SIZE).sum() > 3


def test_more_dead_codes_than_vectors_of_their_branch_wait():
    book = started(interval=1, decay=0.99, threshold=0.5)
    middle = F.normalize(book.codebook[:SIZE].mean(0), dim=0)
    near = F.normalize(middle + 0.01 * unit(SCANS, 1, WIDTH, seed=4), dim=-1)  # all in one branch
    kill(book, torch.arange(SIZE, SIZE + 3))
    book(near)
    assert (book.code_count[SIZE : SIZE + 3] == 0).all()


def test_it_starts_by_itself_from_means_over_three_scans():
    book = new_book(start_step=0)
    data = unit(SCANS, 7, WIDTH, seed=9)
    book._start_when_due(data, torch.ones(SCANS, 7, dtype=torch.bool))
    assert (book.code_count == 1).all()
    triples = [
        F.normalize(data[a, i] + data[b, j] + data[c, k], dim=0)
        for a, b, c in itertools.combinations(range(SCANS), 3)
        for i, j, k in itertools.product(range(7), repeat=3)
    ]
    near = torch.cdist(book.codebook.double(), torch.stack(triples).double()).amin(1)
    assert near.max() < 1e-5
    branches = book.codebook.view(BRANCHES, SIZE, WIDTH)
    within = (branches - branches.mean(1, keepdim=True)).square().sum()
    assert within < 0.7 * (book.codebook - book.codebook.mean(0)).square().sum()
    assert len(book.search(data.flatten(0, 1)).unique()) > 15


def test_a_start_from_few_vectors_is_filled_by_later_batches():
    book = new_book(start_step=0, interval=1)
    data = unit(6, 2, WIDTH)
    book._start_when_due(data, torch.ones(6, 2, dtype=torch.bool))
    assert book.code_count.sum() == 12  # the others are copies that nothing counts for
    for step in range(1, 30):
        book(unit(SCANS, TOKENS, WIDTH, seed=step))
    assert len(book.codebook.unique(dim=0)) == CODES
    assert float(book.usage()) > 0.9


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, book in (
        ("given", new_book(0.5, 0.5, 2)),
        ("itself", new_book(0.5, 0.5, 2, start_step=0)),
    ):
        if name == "given":
            book.start(unit(100 + rank, WIDTH, seed=50 + rank))
        states = []
        for step in range(7):
            book(unit(SCANS, TOKENS - 10, WIDTH, seed=1000 * rank + step))
            states.append({key: value.clone() for key, value in book.state_dict().items()})
        torch.save(states, f"{folder}/{name}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_hold_the_same_bits_and_do_what_one_does(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    for name in ("given", "itself"):
        one, other = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        for step, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            for key, value in mine.items():
                assert torch.equal(value, theirs[key]), (name, step, key)
        alone = new_book(0.5, 0.5, 2)
        alone.load_state_dict(one[0])
        for step in range(1, 7):
            alone(
                torch.cat([unit(SCANS, TOKENS - 10, WIDTH, seed=1000 * r + step) for r in (0, 1)])
            )
        torch.testing.assert_close(one[-1]["codebook"], alone.codebook, rtol=1e-4, atol=1e-5)


def test_branches_divide_the_codes(make_codec):
    with pytest.raises(ConfigurationError, match=r"code_branches must divide num_codes \(32\)"):
        make_codec(code_branches=5)
    with pytest.raises(ConfigurationError, match="code_branches must be an integer >= 1"):
        make_codec(code_branches=0)
