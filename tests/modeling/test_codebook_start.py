"""The codebook that starts by itself, for loops that know nothing of codebooks."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from cortexicon.modeling import ConfigurationError, quantization_avq
from cortexicon.modeling.quantization_avq import AVQCodebook

SCANS, TOKENS, WIDTH = 9, 7, 4


def batch(step=0, rank=0, scans=SCANS):
    """Float32 (scans, TOKENS, WIDTH) of unit length."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return F.normalize(torch.randn(scans, TOKENS, WIDTH, generator=generator), dim=-1)


def new_codebook(codes=8, start_step=2, interval=10**6):
    return AVQCodebook(codes, WIDTH, 0.9, 0.2, interval, start_step=start_step).train()


def mask_of(rank, step):
    """Bool (SCANS, TOKENS): as many scans of process 1 hold no data as steps have passed."""
    mask = torch.ones(SCANS, TOKENS, dtype=torch.bool)
    mask[: rank * step] = False
    return mask


def nearest(codes, vectors):
    """Distance of each code to the vector next to it, float32 (codes,)."""
    return (codes[:, None] - vectors).norm(dim=-1).amin(1)


def test_it_starts_after_its_number_of_training_forwards():
    book = new_codebook(start_step=2)
    book.eval()(batch(9))
    book.train()(batch(9), update=False)
    assert book.updates == 0  # neither trained anything
    started = []
    for step in range(4):
        output = book(batch(step))
        started.append(bool(book.initialized))
        assert (output.commitment_loss > 0) == book.initialized
    assert started == [False, False, True, True]
    assert book.updates == 4


def test_without_a_step_it_waits_for_start():
    book = new_codebook(start_step=None)
    for step in range(5):
        book(batch(step))
    assert not book.initialized
    assert book.updates == 0


def test_every_code_is_a_mean_over_three_scans():
    mask = torch.ones(SCANS, TOKENS, dtype=torch.bool)
    mask[2], mask[5, 3:] = False, False
    data = batch()
    book = new_codebook(start_step=0)
    book._start_when_due(data, mask)
    assert (book.code_count == 1).all()
    torch.testing.assert_close(book.code_sum, book.codebook)
    assert len(book.codebook.unique(dim=0)) == len(book.codebook)
    valid = [(scan, data[scan, token]) for scan, token in mask.nonzero().tolist()]
    triples = [
        F.normalize(a[1] + b[1] + c[1], dim=0)
        for a, b, c in itertools.combinations(valid, 3)
        if len({a[0], b[0], c[0]}) == 3
    ]
    assert nearest(book.codebook, torch.stack(triples)).max() < 1e-5
    assert nearest(book.codebook, data[mask]).min() > 1e-3  # nobody's own vector


def test_more_codes_than_vectors_are_filled_by_later_batches():
    vectors = SCANS * TOKENS
    book = new_codebook(codes=3 * vectors, start_step=0, interval=2)
    book(batch(0))
    assert (book.code_count > 0).sum() <= vectors
    torch.testing.assert_close(book.codebook.norm(dim=-1), torch.ones(3 * vectors))
    for step in range(1, 12):
        codes = book(batch(step)).codes
        # A code without a count is a copy of one that comes first, so no token has it.
        assert (book.code_count[codes] > 0).all()
    assert len(book.codebook.unique(dim=0)) == 3 * vectors


def test_too_few_scans_are_waited_out_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(quantization_avq.logger, "warning_once", said.append)
    book = new_codebook(start_step=1)
    for step in range(3):
        book(batch(step, scans=5))
    assert not book.initialized
    assert "holds 5 scans; expected 6 or more" in said[0]
    book(batch(3))
    assert book.initialized


def test_the_step_is_a_field_of_the_configuration(make_codec, windows):
    codec = make_codec(start=False, codebook_start_step=1).train()
    codec(windows)
    assert not codec.quantizer.initialized
    codec(windows)
    assert codec.quantizer.initialized
    assert make_codec(start=False, codebook_start_step=None).quantizer.start_step is None
    with pytest.raises(ConfigurationError, match="codebook_start_step must be an integer >= 0"):
        make_codec(codebook_start_step=-1)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    book = new_codebook(codes=40, start_step=1, interval=2)
    states = []
    for step in range(6):
        book(batch(step, rank), mask_of(rank, step))
        states.append({name: value.clone() for name, value in book.state_dict().items()})
    torch.save(states, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_start_alike_from_the_data_of_both(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for step, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert bool(mine["initialized"]) == (step >= 1)
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), (step, name)
    alone = new_codebook(codes=40, start_step=1, interval=2)
    for step in range(2):
        data = torch.cat([batch(step, rank) for rank in range(2)])
        alone(data, torch.cat([mask_of(rank, step) for rank in range(2)]))
    torch.testing.assert_close(one[1]["codebook"], alone.codebook)
