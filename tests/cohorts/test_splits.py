"""Splits by participant: disjoint, stratified, and refused when tampered with."""

import hashlib
import json

import pytest

from cortexicon.cohorts import CohortError, Split, load_cohort, load_split, make_split

SCHEMES = ("holdout", "site_stratified", "leave_sites_out", "hash")


def folds_of(cohort, scheme):
    return make_split(cohort, scheme, num_folds=4, validation_fraction=0.2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_usable_person_is_in_one_part_of_every_fold(cohort, scheme):
    usable = set(cohort.participants.index[cohort.participants["recommended"]])
    for fold in folds_of(cohort, scheme):
        named = [subject for subjects in fold.values() for subject in subjects]
        assert len(named) == len(set(named))
        assert set(named) == usable
        assert {"train", "validation", "test"} <= set(fold)


@pytest.mark.parametrize("scheme", ["site_stratified", "leave_sites_out"])
def test_cross_validation_tests_everyone_once(cohort, scheme):
    tested = [subject for fold in folds_of(cohort, scheme) for subject in fold["test"]]
    assert len(tested) == len(set(tested)) == 54


def test_site_stratified_folds_hold_every_site_alike(cohort):
    site = cohort.participants["site"]
    for fold in folds_of(cohort, "site_stratified"):
        counts = site[fold["test"]].value_counts()
        assert set(counts.index) == {"A", "B", "C", "D"}
        assert counts.max() - counts.min() <= 1
        assert site[fold["validation"]].nunique() == 4


def test_leave_sites_out_never_shares_a_site(cohort):
    site = cohort.participants["site"]
    for fold in folds_of(cohort, "leave_sites_out"):
        rest = set(site[fold["train"]]) | set(site[fold["validation"]])
        assert not set(site[fold["test"]]) & rest


def test_holdout_fractions_and_sites(cohort):
    fold = make_split(cohort, "holdout", test_sites=["B"], test_fraction=0.25)[0]
    site = cohort.participants["site"]
    assert set(site[fold["test_sites"]]) == {"B"}
    others = len(fold["train"]) + len(fold["validation"]) + len(fold["test"])
    assert len(fold["test"]) == pytest.approx(0.25 * others, abs=1)
    assert set(site[fold["test"]]) == {"A", "C", "D"}


def test_hash_scheme_follows_the_written_rule(cohort):
    table = cohort.participants[cohort.participants["recommended"]]
    split = make_split(cohort, "hash", test_sites=["C"])
    expected = {
        subject
        for subject, sub_id in table["sub_id"].items()
        if int(hashlib.sha256(str(sub_id).encode()).hexdigest(), 16) % 6 == 0
        and table.loc[subject, "site"] != "C"
    }
    assert set(split[0]["test"]) == expected
    assert set(split[0]["test_sites"]) == set(table.index[table["site"] == "C"])
    with pytest.raises(CohortError, match=r"sites whose TR is not 2 s .*found A\. .*C, D"):
        make_split(cohort, "hash", test_sites=["A"])
    for seed in range(5):
        assert set(make_split(cohort, "hash", seed=seed, test_sites=1).settings["test_sites"]) < {
            "C",
            "D",
        }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_seed_same_split(cohort, scheme):
    assert folds_of(cohort, scheme).hash == folds_of(cohort, scheme).hash


def test_another_seed_another_split(cohort):
    hashes = {make_split(cohort, "holdout", seed=seed).hash for seed in range(4)}
    assert len(hashes) == 4


def test_round_trip(cohort, tmp_path):
    split = make_split(cohort, "holdout")
    back = load_split(split.save(tmp_path / "run" / "split.json"), cohort)
    assert back == split
    assert back.hash == split.hash
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["split.json"]


def damaged(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def move_one(content):
    fold = content["folds"][0]
    fold["test"].append(fold["train"].pop())


def share_one(content):
    fold = content["folds"][0]
    fold["test"].append(fold["train"][0])


def share_under_another_name(content):
    fold = content["folds"][0]
    fold["test"].append("sub-" + fold["train"][0])


def empty_test(content):
    content["folds"][0]["test"] = []


def strange_part(content):
    content["folds"][0]["tset"] = ["s01"]


def old_format(content):
    content["format"] = 0


def no_folds(content):
    del content["folds"]


DAMAGE = {
    "edited": (move_one, "changed after it was written"),
    "shared": (share_one, r"fold 0: expected every person in one part, found 's\d+' in train and"),
    "shared under another spelling": (share_under_another_name, r"and 'sub-s\d+' in test"),
    "empty part": (empty_test, "empty: test"),
    "unknown part": (strange_part, "unknown: tset"),
    "format": (old_format, "expected split format 1, found 0"),
    "incomplete": (no_folds, "found damage"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(name, cohort, tmp_path):
    change, pattern = DAMAGE[name]
    path = make_split(cohort, "holdout").save(tmp_path / "split.json")
    damaged(path, change)
    with pytest.raises(CohortError, match=pattern):
        load_split(path)


def test_other_cohort_and_missing_file(cohort, tmp_path):
    path = make_split(cohort, "holdout").save(tmp_path / "split.json")
    with pytest.raises(CohortError, match="unknown: s00"):
        load_split(path, cohort.subset(cohort.subject_ids[1:]))
    changed = cohort.subset(cohort.subject_ids)
    changed._content_hash = "0" * 64
    with pytest.raises(CohortError, match="content hash 000000000000"):
        load_split(path, changed)
    with pytest.raises(CohortError, match="found none"):
        load_split(tmp_path / "absent.json")
    path.write_text("no json")
    with pytest.raises(CohortError, match="found damage"):
        load_split(path)


def test_overlap_is_never_written(tmp_path):
    fold = {"train": ["01", "2"], "validation": ["3"], "test": ["sub-1"]}
    with pytest.raises(CohortError, match="'01' in train and 'sub-1' in test"):
        Split("mine", [fold], "0" * 64).save(tmp_path / "split.json")
    assert not list(tmp_path.iterdir())


WRONG = {
    "scheme": ({"scheme": "random"}, "expected a split scheme of holdout"),
    "one fold": ({"scheme": "site_stratified", "num_folds": 1}, "expected 2 to 54 folds"),
    "more folds than sites": ({"scheme": "leave_sites_out", "num_folds": 9}, "2 to 4 folds"),
    "fraction": ({"scheme": "holdout", "test_fraction": 1.5}, "test_fraction between 0 and 1"),
    "site": ({"scheme": "holdout", "test_sites": ["Z"]}, "found Z. Choose among A, B, C, D"),
    "all sites": ({"scheme": "holdout", "test_sites": 4}, "and one left, found 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_requests(name, cohort):
    arguments, pattern = WRONG[name]
    with pytest.raises(CohortError, match=pattern):
        make_split(cohort, **arguments)


@pytest.mark.data
def test_real_cohort(data_folder):
    cohort = load_cohort(data_folder / "abide1_cc200")
    fold = make_split(cohort, "hash", test_sites=["UCLA_2", "OHSU"])[0]
    table = cohort.participants
    assert sum(len(subjects) for subjects in fold.values()) == 752
    two_seconds = table.loc[fold["test"], "tr"] == 2.0
    # Counted straight from the table by the written rule: 81 of the 465 recommended scans at 2 s.
    assert two_seconds.sum() == 81
    assert ((table["tr"] == 2.0) & table["recommended"]).sum() == 465
    assert set(table.loc[fold["test_sites"], "site"]) == {"UCLA_2", "OHSU"}
