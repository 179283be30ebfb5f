"""`cortexicon prepare`: the files of a preprocessing pipeline to a cohort folder and its report."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cortexicon.cohorts import Prepared

#: Scans named on the screen; quality.tsv names them all.
MAX_NAMED = 20


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser(
        "prepare",
        help="turn preprocessed fMRI into a cohort",
        description="Read the scans of SOURCE (fMRIPrep, XCP-D, CIFTI, NIfTI, .1D, .tsv, .csv, "
        ".npy, .npz, .mat, Parquet), check them, and write a cohort. Scans that are finished are "
        "not read again; one that cannot be used is listed and stops no other.",
        epilog="Exit code: 0, 1 when scans were left out, 2 when no cohort could be written.",
    )
    command.add_argument("source", metavar="SOURCE", type=Path, help="folder of scans, or one scan")
    command.add_argument("--participants", type=Path, required=True, help="participants.tsv")
    command.add_argument("--out", type=Path, required=True, help="cohort folder to write")
    _add_atlas(command)
    _add_reading(command)
    command.add_argument("--task", default=None, help="only scans of this BIDS task")
    command.add_argument("--space", default=None, help="only scans in this BIDS space")
    command.add_argument("--site", default=None, help="scanner, for tables without a column site")
    command.add_argument(
        "--sex-codes",
        metavar="CODE=F|M",
        nargs="+",
        default=None,
        help="what codes in the column sex mean: 1=M 2=F",
    )
    command.add_argument("--num-proc", type=int, default=1, help="processes (default: 1)")
    command.add_argument(
        "--dask",
        metavar="ADDRESS",
        default=None,
        help="scheduler of a Dask cluster that sees the same files; give its workers one thread "
        "each (`dask worker --nthreads 1`), as a process reads one scan at a time",
    )


def _add_atlas(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("parcellation")
    group.add_argument(
        "--atlas",
        default=None,
        help="schaefer100 ... schaefer1000, aal, aal3, cc200, cc400, harvard-oxford, a424, "
        "tian-s1 ..., or a label volume; default: the regions that the files bring",
    )
    group.add_argument("--atlas-labels", type=Path, default=None, help="table of region names")
    group.add_argument(
        "--atlas-folder",
        type=Path,
        default=None,
        help="folder of label volumes and tables (default: nilearn fetches them)",
    )


def _add_reading(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("reading and cleaning")
    group.add_argument("--confounds", metavar="STRATEGY", default=None, help=_CONFOUNDS)
    group.add_argument(
        "--scrub",
        metavar="MM",
        type=float,
        default=None,
        help="drop volumes with a framewise displacement above this",
    )
    group.add_argument(
        "--band-pass", metavar=("LOW", "HIGH"), type=float, nargs=2, default=None, help="Hz"
    )
    group.add_argument(
        "--tr", metavar="SECONDS", type=float, default=None, help="of every scan, whatever it says"
    )
    group.add_argument(
        "--time-axis",
        type=int,
        choices=(0, 1),
        default=None,
        help="of arrays without labels that could be read either way round",
    )


_CONFOUNDS = (
    "what to regress out of fMRIPrep's scans: a preset such as simple, or components of nilearn's "
    "load_confounds joined by +"
)


def run(arguments: argparse.Namespace) -> int:
    """Prepare a cohort; 1 when scans were left out."""
    from cortexicon.cohorts import AtlasChoice, People, Reading, prepare_cohort

    atlas = None
    if arguments.atlas is not None:
        labels, folder = _whole(arguments.atlas_labels), _whole(arguments.atlas_folder)
        atlas = AtlasChoice(_whole(arguments.atlas) or "", labels, folder)
    band = None if arguments.band_pass is None else tuple(arguments.band_pass)
    prepared = prepare_cohort(
        arguments.source,
        arguments.out,
        People(arguments.participants, arguments.site, _codes(arguments.sex_codes)),
        Reading(
            atlas, arguments.confounds, arguments.scrub, band, arguments.tr, arguments.time_axis
        ),
        task=arguments.task,
        space=arguments.space,
        num_proc=arguments.num_proc,
        dask_address=arguments.dask,
        progress=True,
    )
    _say(prepared, arguments.out)
    if find_spec("matplotlib") is None:
        print("no report: it needs matplotlib, pip install 'cortexicon[train]'", file=sys.stderr)
    else:
        from cortexicon.evaluation import write_cohort_report

        print(f"report  -> {write_cohort_report(arguments.out)}")
    return 1 if (prepared.quality["status"] == "refused").any() else 0


def _say(prepared: "Prepared", out: Path) -> None:
    """Name the scans that were left out, and say where the rest is."""
    table = prepared.quality
    refused = table[table["status"] == "refused"]
    for row in refused.head(MAX_NAMED).itertuples():
        print(f"left out {row.subject_id} ({row.source}): {row.reason}", file=sys.stderr)
    if len(refused) > MAX_NAMED:
        print(f"and {len(refused) - MAX_NAMED} more, see {out / 'quality.tsv'}", file=sys.stderr)
    if prepared.without_scan:
        names = ", ".join(prepared.without_scan[:5])
        more = "" if len(prepared.without_scan) <= 5 else ", ..."
        count = len(prepared.without_scan)
        print(f"{count} participants without a scan: {names}{more}", file=sys.stderr)
    used = int((table["status"] == "used").sum())
    before = prepared.num_finished_before
    print(
        f"{used} of {len(table)} scans, {len(refused)} left out, "
        f"{len(table) - used - len(refused)} not needed"
        + (f"; {before} were finished before" if before else "")
    )
    print(f"cohort  -> {out}")
    print(f"quality -> {out / 'quality.tsv'}")


def _whole(path: str | Path | None) -> str | None:
    """A path that means the same in every process; names of atlases stay as they are."""
    if path is None:
        return None
    return str(Path(path).absolute()) if Path(path).exists() else str(path)


def _codes(pairs: list[str] | None) -> dict[str, str] | None:
    """`1=M 2=F` as a dictionary."""
    if pairs is None:
        return None
    from cortexicon.cohorts import CohortError

    codes = dict(pair.partition("=")[::2] for pair in pairs)
    if not set(codes.values()) <= {"F", "M"}:
        raise CohortError(f"--sex-codes: expected CODE=F or CODE=M, found {' '.join(pairs)}.")
    return codes
