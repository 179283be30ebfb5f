"""`cortexicon publish` of everything that can be published, and what comes back."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from cortexicon.cohorts import load_cohort, make_split

PULL_CODEC = """
import torch
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, AutoTokenizer
from cortexicon.modeling import AVQModel
model = AutoModel.from_pretrained(name, revision=revision)
local = AVQModel.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
extractor = AutoFeatureExtractor.from_pretrained(name, revision=revision)
processor = AutoProcessor.from_pretrained(name, revision=revision)
found = [
    type(model).__name__,
    all(torch.equal(model.state_dict()[k], v) for k, v in local.state_dict().items()),
    type(tokenizer).__name__,
    extractor.atlas,
    processor.tokens_per_window,
]
"""
PULL_LM = """
import torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(name).eval()
processor = AutoProcessor.from_pretrained(name)
series = torch.randn(60, 48, generator=torch.Generator().manual_seed(0)).numpy() + 100
inputs = processor(text="Age?", fmri=series[:40], tr=2.0)
with torch.no_grad():
    plain = model(**inputs).logits
found = list(plain.shape)
"""
PULL_BOTH = """
from transformers import AutoModel, AutoProcessor
pinned = {"revision": revision}
model = AutoModel.from_pretrained(name, **pinned)
connectome = AutoModel.from_pretrained(name, subfolder="connectome", **pinned)
processor = AutoProcessor.from_pretrained(name, **pinned)
series = torch.randn(90, 48, generator=torch.Generator().manual_seed(0)).numpy() + 100
scan = processor(fmri=series, tr=2.0)
ids = processor(
    text="Age?", codes=model.encode(scan["input_values"]).codes,
    connectivity_codes=connectome.encode(scan["connectivity"]).codes,
)["input_ids"]
found = [type(model).__name__, type(connectome).__name__, int((ids > 256).sum())]
"""
PULL_ADAPTER = """
from peft import PeftModel
adapted = PeftModel.from_pretrained(model, adapter, revision=revision).eval()
with torch.no_grad():
    found = float((adapted(**inputs).logits - plain).abs().max())
"""
PULL_COHORT = """
import huggingface_hub
from datasets import load_dataset
from cortexicon.cohorts import load_cohort
stream = load_dataset(name, split="train", streaming=True, revision=revision)
first = next(iter(stream))
whole = huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision)
whole = load_cohort(whole)
found = [first["subject_id"], len(first["time_series"]), whole.content_hash]
"""
PULL_SPACE = """
import huggingface_hub
found = huggingface_hub.snapshot_download(name, repo_type="space")
"""
PULL_METRIC = """
import evaluate
metric = evaluate.load(name)
found = metric.compute(predictions=[[[1.0], [2.0], [4.0]]], references=[[[1.0], [2.0], [4.0]]])
"""


def rooms(repository):
    return {
        path.name: path.read_bytes()
        for room in ("modeling", "tokenization")
        for path in (repository / room).glob("*.py")
    }


def held(hub, name, kind="model"):
    return hub.repository(name, kind).head.files


def test_a_codec_goes_up_in_one_commit_and_comes_back(client, hub, run_folder, repository):
    for _ in range(2):  # the second time there is nothing left to do
        code, out = client.cli("publish", run_folder / "avq", "user/codec")
        assert code == 0, out
    found = hub.repository("user/codec")
    assert len(found.commits) == 2
    assert {"LICENSE", "README.md", "results.json", ".eval_results/cortexicon.yaml"} <= set(
        found.head.files
    )
    ((tag, sha),) = found.tags.items()
    assert sha == found.head.sha
    assert f'"revision": "{tag}"'.encode() in found.head.files["README.md"]

    code_files = {name: text for name, text in found.head.files.items() if name.endswith(".py")}
    sources = rooms(repository)
    assert "modeling_avq.py" in code_files
    assert "processing_avq.py" in code_files
    for name, text in code_files.items():
        assert text == sources[name], name
    assert client.run(
        PULL_CODEC, name="user/codec", revision=tag, folder=str(run_folder / "avq")
    ) == ["AVQModel", True, "AVQTokenizer", "simulated48", 4]


def test_nobody_is_named_in_what_was_pushed(client, hub, run_folder):
    files = held(hub, "user/codec")
    assert b'"refused_scans": {\n  "count": 1\n }' in files["run.json"]
    for name, content in files.items():
        assert b"sim-0" not in content, name


def test_a_card_states_scores_beside_chance_and_by_group(hub):
    card = held(hub, "user/codec")["README.md"].decode()
    assert "**0.200** [0.150, 0.250]" in card
    assert "| | each region's mean (chance) | 0.000 |" in card
    assert "| | PCA + k-means, as many tokens | 0.100 |" in card
    assert "no person was scanned" in card
    results = held(hub, "user/codec")[".eval_results/cortexicon.yaml"].decode()
    assert "id: user/cohort" in results
    assert "task_id: r2_of_the_reconstruction_test" in results


def test_language_model_and_adapter(client, hub, run_folder):
    stub = "import cortexicon._publish_checkpoint as m\nm.check_clean_load = lambda *_: None"
    client.run(stub)  # one whole load without the package a module is enough; see test_release.py
    code, out = client.cli("publish", run_folder, "user/reader")  # of a run, its language model
    assert code == 0, out
    assert client.run(PULL_LM, name="user/reader")[2] > 256
    ((base, _),) = hub.repository("user/reader").tags.items()
    code, out = client.cli(
        *("publish", run_folder / "adapter", "user/adapter", "--data", "simulated"),
        *("--base", f"user/reader@{base}", "--cohort", run_folder / "cohort"),
    )
    assert code == 0, out
    ((pin, _),) = hub.repository("user/adapter").tags.items()
    card = held(hub, "user/adapter")["README.md"].decode()
    assert f'"user/reader", revision="{base}"' in card
    assert f'"user/adapter", revision="{pin}"' in card
    assert "holds nothing of a codec and no row of a code" in card
    assert json.loads(held(hub, "user/adapter")["adapter_config.json"])[
        "base_model_name_or_path"
    ] == ("user/reader")
    assert 0 < client.run(PULL_ADAPTER, adapter="user/adapter", revision=pin) < 10


def test_the_connectivity_stream(client, hub, run_folder):
    code, out = client.cli("publish", run_folder / "connectome", "user/matrices")
    assert code == 0, out
    kind = "from transformers import AutoModel\nfound = type(AutoModel.from_pretrained(name))"
    assert client.run(kind + ".__name__", name="user/matrices") == "AVQConnectomeModel"
    assert "training mean alone (chance)" in held(hub, "user/matrices")["README.md"].decode()


def test_both_streams_lie_in_one_repository(client, hub, run_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(run_folder / "results.json", run)
    for stream in ("avq", "connectome"):
        shutil.copytree(run_folder / stream, run / stream)
    code, out = client.cli("publish", run, "user/both")
    assert code == 0, out
    files = held(hub, "user/both")
    assert {"model.safetensors", "connectome/model.safetensors", "connectome/run.json"} <= set(
        files
    )
    assert "modeling_avq_connectome.py" in files
    assert not [name for name in files if name.startswith("connectome/") and name.endswith(".py")]
    card = files["README.md"].decode()
    assert 'AutoModel.from_pretrained(checkpoint, subfolder="connectome", **pinned)' in card
    assert "R2 of the reconstruction" in card
    assert "PCA 192 + k-means 8192, triples: 64 tokens" in card
    assert "Privacy of the codebook of windows: no code lies" in card
    assert "Privacy of the codebook of connectivity: no code lies" in card
    ((tag, _),) = hub.repository("user/both").tags.items()
    found = client.run(PULL_BOTH, name="user/both", revision=tag)
    # 2 windows of 4 tokens and 4 of connectivity, their markers, and the separator of windows
    assert found == ["AVQModel", "AVQConnectomeModel", 2 * 4 + 4 + 4 + 1]


def test_the_readme_s_question_is_answered(run_folder, repository, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "get_fmri_tokens" in block)
    for name in ("lm", "cohort"):
        assert f'"runs/demo/{name}"' in code
        code = code.replace(f"runs/demo/{name}", str(run_folder / name))
    scope = {}
    exec(code, scope)
    assert "Question: Age?" in capsys.readouterr().out
    assert scope["codes"].shape == (1, 4)
    assert scope["series"].shape == (1, 40, 48)


def test_streams_of_two_vocabularies_stay_apart(client, run_folder, tmp_path):
    run = tmp_path / "run"
    for stream in ("avq", "connectome"):
        shutil.copytree(run_folder / stream, run / stream)
    config = json.loads((run / "connectome/config.json").read_text())
    config["text_table_sha256"] = "0" * 64
    (run / "connectome/config.json").write_text(json.dumps(config))
    code, out = client.cli("publish", run, "user/apart", "--dry-run", "--out", tmp_path / "out")
    assert code == 2
    assert "expected the text table (sha256) of the codec" in out


def test_streams_of_two_splits_stay_apart(client, run_folder, tmp_path):
    run = tmp_path / "run"
    for stream in ("avq", "connectome"):
        shutil.copytree(run_folder / stream, run / stream)
    other = make_split(load_cohort(run_folder / "cohort"), "holdout", seed=1)
    other.save(tmp_path / "other.json")
    facts = json.loads((run / "connectome/run.json").read_text())
    facts["arguments"]["split"], facts["split_hash"] = str(tmp_path / "other.json"), other.hash
    (run / "connectome/run.json").write_text(json.dumps(facts))
    code, out = client.cli("publish", run, "user/apart", "--dry-run", "--out", tmp_path / "out")
    assert code == 2
    assert "its split is not that of" in out


def test_a_cohort_streams(client, hub, run_folder):
    code, out = client.cli("publish", run_folder / "cohort", "user/cohort")
    assert code == 0, out
    ((tag, _),) = hub.repository("user/cohort", "dataset").tags.items()
    first, length, content_hash = client.run(PULL_COHORT, name="user/cohort", revision=tag)
    assert first.startswith("sim-")
    assert length > 100
    assert (
        content_hash == json.loads((run_folder / "cohort/cohort.json").read_text())["content_hash"]
    )
    card = held(hub, "user/cohort", "dataset")["README.md"].decode()
    assert "data_files: data/*.parquet" in card
    assert f'streaming=True, revision="{tag}")' in card


def test_a_metric_loads_by_its_name(client, hub, repository):
    folder = repository / "evaluation" / "metrics" / "fmri_reconstruction"
    code, out = client.cli("publish", folder, "user/fmri_reconstruction")
    assert code == 0, out
    assert client.run(PULL_METRIC, name="user/fmri_reconstruction")["r2"] == 1.0
    code, out = client.cli("publish", folder, "user/other")
    assert code == 2
    assert "expected a repository named fmri_reconstruction" in out


def test_a_space_goes_up_and_runs_from_what_comes_back(client, hub, run_folder, tmp_path):
    pytest.importorskip("gradio", reason="needs pip install 'cortexicon[demo]'")
    space = tmp_path / "try-it"
    assert client.cli("space", run_folder / "avq", "--export", space, "--title", "Try it")[0] == 0
    for _ in range(2):  # the second time there is nothing left to do
        code, out = client.cli("publish", space, "user/try-it")
        assert code == 0, out
    found = hub.repository("user/try-it", "space")
    assert found.sdk == "gradio"
    assert len(found.commits) == 2
    sent = {
        path.relative_to(space).as_posix(): path.read_bytes()
        for path in space.rglob("*")
        if path.is_file()
    }
    assert {name: text for name, text in found.head.files.items() if name in sent} == sent
    assert set(found.head.files) - set(sent) == {".gitattributes"}

    down = client.run(PULL_SPACE, name="user/try-it")
    script = "import runpy\nfrom cortexicon.model_cards import space_app\n"
    script += "space_app.serve = lambda *a, **k: print(a[0].name, space_app.__file__)\n"
    script += "runpy.run_path('app.py', run_name='__main__')"
    done = subprocess.run(  # no PYTHONPATH: the package is the one that came back
        [sys.executable, "-c", script],
        cwd=down,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("checkpoint ")
    assert str(down) in done.stdout


def test_a_dry_run_writes_what_would_be_pushed_and_asks_nobody(client, hub, run_folder, tmp_path):
    asked = len(hub.requests)
    out_folder = tmp_path / "out"
    for _ in range(2):
        argv = ("publish", run_folder / "avq", "user/codec", "--dry-run", "--out", out_folder)
        code, out = client.cli(*argv)
        assert code == 0, out
    assert len(hub.requests) == asked
    written = {
        path.relative_to(out_folder).as_posix(): path.read_bytes()
        for path in out_folder.rglob("*")
        if path.is_file()
    }
    pushed = {k: v for k, v in held(hub, "user/codec").items() if k != ".gitattributes"}
    assert written == pushed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["avq", "no-owner"], "expected OWNER/NAME"),
        (["nothing", "user/x"], "expected a run, a checkpoint"),
        (["avq", "user/x", "--license", "mit", "--data", "DATA"], "cannot carry the licence 'mit'"),
        (["avq", "user/x", "--data", "missing.yaml"], "found nothing"),
        (["adapter", "user/x"], "needs --base"),
        (["adapter", "user/x", "--base", "user/reader", "--data", "simulated"], "NAME@REVISION"),
        (["avq", "user/x", "--cohort", "nowhere"], "the cohort of training is not there"),
    ],
)
def test_a_mistake_ends_in_one_message(client, hub, run_folder, tmp_path, argv, message):
    data = tmp_path / "data.yaml"
    text = "name: x\npeople: x\nconsent: x\npreprocessing: x\nlicense: cc-by-nc-sa-4.0\n"
    data.write_text(text)
    asked = len(hub.requests)
    argv = [str(data) if one == "DATA" else one for one in argv]
    code, out = client.cli("publish", run_folder / argv[0], *argv[1:], "--dry-run")
    assert code == 2
    assert message in out
    assert len(hub.requests) == asked


def test_a_checkpoint_that_names_a_subject_stays_here(client, hub, run_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    facts = json.loads((copy / "avq/run.json").read_text())
    facts["command"] += " --without sim-00003"
    (copy / "avq/run.json").write_text(json.dumps(facts))
    code, out = client.cli("publish", copy / "avq", "user/leaky")
    assert code == 2
    assert "names a subject of the cohort ('sim-00003')" in out
    assert ("model", "user/leaky") not in hub.repositories
