"""Two processes with different data, over gloo: one codebook, from the start to the revivals."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from cortexicon.modeling.quantization_avq import AVQCodebook

CODES, WIDTH, SCANS, TOKENS, STEPS = 24, 5, 4, 6, 7


def vectors(rank, step, count=SCANS, sharpness=1.5):
    """Float32 (scans, tokens, WIDTH) in a cone around axis `rank`."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    axis = torch.zeros(WIDTH)
    axis[rank] = sharpness
    return F.normalize(torch.randn(count, TOKENS, WIDTH, generator=generator) + axis, dim=-1)


def mask_of(rank, step):
    """Bool (SCANS, TOKENS): some tokens of process 1 hold no data."""
    mask = torch.ones(SCANS, TOKENS, dtype=torch.bool)
    if rank == 1:
        mask[0, :step] = False
    return mask


def new_codebook(decay, threshold, interval=3):
    return AVQCodebook(CODES, WIDTH, decay, threshold, interval).train()


def worker(rank, folder, decay, threshold):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    book = new_codebook(decay, threshold)
    # Masked tokens can make the processes' numbers of vectors differ at the start.
    book.start(vectors(rank, 99, SCANS + rank, sharpness=20.0).flatten(0, 1), seed=3)
    states = [{name: value.clone() for name, value in book.state_dict().items()}]
    perplexity = []
    for step in range(STEPS):
        output = book(vectors(rank, step), mask_of(rank, step))
        states.append({name: value.clone() for name, value in book.state_dict().items()})
        perplexity.append(output.perplexity)
    torch.save({"states": states, "perplexity": perplexity}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_both(folder, decay, threshold):
    mp.spawn(worker, (str(folder), decay, threshold), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def one_process(start, decay, threshold, interval=3):
    """The same updates in one process that holds both processes' data."""
    book = new_codebook(decay, threshold, interval)
    book.load_state_dict(start)
    states = []
    for step in range(STEPS):
        book(
            torch.cat([vectors(rank, step) for rank in range(2)]),
            torch.cat([mask_of(rank, step) for rank in range(2)]),
        )
        states.append({name: value.clone() for name, value in book.state_dict().items()})
    return states


@pytest.fixture(scope="module")
def revived(tmp_path_factory):
    """States of both processes by step; a high threshold makes codes die and come back."""
    return run_both(tmp_path_factory.mktemp("revived"), 0.5, 0.5)


def test_both_processes_hold_the_same_bits_at_every_step(revived):
    assert len(revived[0]["states"]) == STEPS + 1
    for step, (one, other) in enumerate(
        zip(revived[0]["states"], revived[1]["states"], strict=True)
    ):
        for name, value in one.items():
            assert torch.equal(value, other[name]), (step, name)
    assert revived[0]["perplexity"] == revived[1]["perplexity"]
    # Their data were not the same.
    assert not torch.equal(vectors(0, 0), vectors(1, 0))


def test_the_start_sees_the_data_of_both(revived):
    start = revived[0]["states"][0]["codebook"]
    assert (start[:, 0] > 0.9).sum() >= 4  # the cone of process 0
    assert (start[:, 1] > 0.9).sum() >= 4  # and that of process 1


def test_two_processes_do_what_one_does_with_all_data(revived):
    alone = one_process(revived[0]["states"][0], 0.5, 0.5)
    for step, (expected, found) in enumerate(
        zip(alone, revived[0]["states"][1:], strict=True), start=1
    ):
        for name in ("codebook", "code_sum", "code_count"):
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-4, atol=1e-5, msg=f"{name}, step {step}"
            )


def test_codes_were_revived(revived):
    never = one_process(revived[0]["states"][0], 0.5, 0.5, interval=10**6)[2]["code_count"]
    dead = never < 0.5 * never.mean()
    assert dead.any()
    found = revived[0]["states"][3]["code_count"]
    torch.testing.assert_close(found, torch.where(dead, never.mean(), never))


def test_the_total_count_is_that_of_both_processes(tmp_path):
    found = run_both(tmp_path, 0.0, 0.0)  # no memory and no revival: counts are the last batch's
    for step in range(STEPS):
        tokens = sum(int(mask_of(rank, step).sum()) for rank in range(2))
        assert tokens == 2 * SCANS * TOKENS - step
        for process in found:
            assert process["states"][step + 1]["code_count"].sum().item() == tokens
