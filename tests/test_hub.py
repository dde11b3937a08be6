"""Push and pull by the real client, over a socket, against a Hub of our own; what fails leaves the folder alone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from loopback_hub import TOKEN, Fault, LoopbackHub
from safetensors.numpy import load_file
from test_card import code_of, metadata_of, report_of

from hf_fip.hub.card import card_of
from hf_fip.tasks.image_architectures import small_vit

REPO = "someone/purified"


def write_result(folder: Path, adapter: bool = False) -> Path:
    """What a purification leaves, small: its model file goes by LFS."""
    model, processor = small_vit(["a", "b"], 8, 1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "plots").mkdir()
    (folder / "plots" / "purification.png").write_bytes(b"\x89PNG picture")
    changes = {}
    if adapter:
        from peft import get_peft_model

        from hf_fip import SingularValueConfig

        model.name_or_path = "outputs/victims/a-victim"
        get_peft_model(model, SingularValueConfig()).save_pretrained(folder)
        for name in ("model.safetensors", "config.json"):
            (folder / name).unlink()
        changes = {"adapter_switched_off": {"asr": 100.0}, "model_is_from_hub": False}
    (folder / "report.json").write_text(json.dumps(report_of(**changes)))
    card_of(folder).save(folder / "README.md")
    return folder


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    return write_result(tmp_path_factory.mktemp("result") / "purified")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return write_result(tmp_path_factory.mktemp("adapter") / "adapter", adapter=True)


@pytest.fixture(scope="module")
def the_hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(the_hub) -> LoopbackHub:
    """The Hub, with nothing in it."""
    for held in (the_hub.repositories, the_hub.objects, the_hub.faults, the_hub.requests):
        held.clear()
    return the_hub


def environment(hub: LoopbackHub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Of a client of that Hub alone, with an empty home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    said = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **said, **({"HF_TOKEN": token} if token else {})}


@pytest.fixture(scope="module")
def client(the_hub, tmp_path_factory):
    """Run steps in a process of its own; gives the answer to the last."""
    home = tmp_path_factory.mktemp("home")
    program = [sys.executable, Path(__file__).with_name("hub_client.py")]
    with (
        open(home / "stderr", "w") as stderr,
        subprocess.Popen(
            program,
            env=environment(the_hub, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):

        def run(name: str, *arguments, **options):
            process.stdin.write(json.dumps([name, [str(argument) for argument in arguments], options]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, (home / "stderr").read_text()
            assert TOKEN not in answer + (home / "stderr").read_text()
            return json.loads(answer)

        yield run
        process.stdin.close()


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_model_is_created_uploaded_and_pulled_back_whole(hub, client, result, tmp_path):
    found = digests(result)
    pushed = client("push", result, "purified", private=True)
    assert pushed.startswith(f"{hub.url}/{REPO}/commit/") and hub.repositories[REPO].private
    assert client("push", result, REPO).startswith(f"{hub.url}/{REPO}/commit/")
    assert list(hub.objects.values()) == [(result / "model.safetensors").read_bytes()]  # by LFS, and once
    assert digests(result) == found  # pushing changes nothing here
    assert client("pull", REPO, tmp_path / "pulled") == str(tmp_path / "pulled")
    back = digests(tmp_path / "pulled")
    assert back.keys() == found.keys()
    assert {name for name in found if back[name] != found[name]} == {"README.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "pulled").rglob("*"))
    assert "is there already" in client("pull", REPO, tmp_path / "pulled")["error"]
    card = (tmp_path / "pulled" / "README.md").read_text()
    assert f'place = "{REPO}"' in code_of(card) and metadata_of(card)["model-index"][0]["name"] == "purified"


def test_pulling_leaves_an_unfinished_run_of_the_same_name(hub, client, result, tmp_path):
    client("push", result, REPO)
    checkpoint = tmp_path / "pulled.partial" / "checkpoint-7" / "model.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"hours of work")
    client("pull", REPO, tmp_path / "pulled")
    assert checkpoint.read_bytes() == b"hours of work" and (tmp_path / "pulled" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".pulled*"))


def test_the_cards_code_runs_in_a_fresh_process_and_gives_the_model(hub, client, result, tmp_path):
    client("push", result, REPO)
    code = code_of(hub.files(REPO)["README.md"].decode())
    code += "\nmodel.save_pretrained('found')"
    env = environment(hub, tmp_path / "elsewhere", token=None)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "found", result))
    assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in expected)


def test_branches_and_pull_requests(hub, client, result, tmp_path):
    assert "/commit/" in client("push", result, REPO, revision="v2")
    assert client("push", result, REPO, create_pr=True).endswith("/discussions/1")
    assert set(hub.files(REPO)) == {".gitattributes"}  # main has neither
    assert "model.safetensors" in hub.files(REPO, "v2") and "model.safetensors" in hub.files(REPO, "refs/pr/1")
    assert client("pull", REPO, tmp_path / "v2", revision="v2") == str(tmp_path / "v2")
    assert "holds no model" in client("pull", REPO, tmp_path / "main")["error"]
    assert "cannot be pulled" in client("pull", REPO, tmp_path / "v3", revision="v3")["error"]


def test_an_adapter_needs_a_base_that_others_have(hub, client, adapter, tmp_path):
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"revision": "0" * 40}))  # of another repository
    refused = client("push", adapter, REPO)["error"]
    assert "which others do not have" in refused and "--base_model" in refused and not hub.repositories
    assert "/commit/" in client("push", adapter, REPO, base_model="someone/received")
    files = hub.files(REPO)
    pushed = json.loads(files["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "someone/received" and pushed["revision"] is None
    front = metadata_of(files["README.md"].decode())
    assert front["base_model"] == "someone/received" and front["base_model_relation"] == "adapter"
    assert b"outputs/victims" not in b"".join(files.values())


def test_what_the_repository_held_of_another_model_goes_and_the_rest_stays(hub, client, result):
    hub.add(REPO, {"adapter_model.safetensors": b"old", "training_args.bin": b"old", "NOTES.md": b"mine"})
    client("push", result, REPO)
    names = set(hub.files(REPO))
    assert "NOTES.md" in names and not {"adapter_model.safetensors", "training_args.bin"} & names


PASSING = {
    "the Hub is busy": Fault("POST", "/commit/", 503, 2),
    "creating fails at first": Fault("POST", "/api/repos/create", 500, 2),
    "the connection is cut while a large file is sent": Fault("PUT", "/lfs/", None, 2),
    "the connection is cut in the commit": Fault("POST", "/commit/", None, 1),
    "a file does not come back at first": Fault("GET", "/resolve/.*config.json", 502, 2),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_may_pass_is_tried_again(case, hub, client, result, tmp_path):
    hub.faults.append(fault := replace(PASSING[case]))
    repo_id = f"someone/{case.replace(' ', '-')}"
    pushed = client("push", result, repo_id)
    assert isinstance(pushed, str), pushed
    assert client("pull", repo_id, tmp_path / "pulled") == str(tmp_path / "pulled")
    assert digests(tmp_path / "pulled")["model.safetensors"] == digests(result)["model.safetensors"]
    assert not fault.times


LASTING = {
    "forbidden": (Fault("POST", "/api/repos/create", 403, 99), r"may not write there \(403\)"),
    "an unknown token": (Fault("POST", "/api/repos/create", 401, 99), r"does not know this token \(401\)"),
    "no such repository": (Fault("POST", "/preupload/", 404, 99), r"no such repository or branch \(404\)"),
    "somebody else committed": (Fault("POST", "/commit/", 412, 99), "Somebody else committed meanwhile"),
    "a file too large": (Fault("POST", "/commit/", 413, 99), "file of this size"),
    "the Hub is down": (Fault("POST", "/commit/", 503, 99), "The Hub answered 503"),
    "the connection is cut again and again": (Fault("PUT", "/lfs/", None, 99), "The Hub cannot be reached"),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_lasts_is_said_leaves_the_folder_whole_and_can_be_repeated(case, hub, client, result):
    fault, message = LASTING[case]
    repo_id, found = f"someone/{case.replace(' ', '-')}", digests(result)
    hub.faults.append(replace(fault))
    refused = client("push", result, repo_id)["error"]
    assert re.search(message, refused) and f"hf-fip push {result} {repo_id}" in refused
    assert digests(result) == found
    assert all(set(hub.files(name)) == {".gitattributes"} for name in hub.repositories)  # all of it, or nothing
    hub.faults.clear()
    arrived = bool(hub.objects)
    hub.requests.clear()
    assert isinstance(client("push", result, repo_id), str) and "model.safetensors" in hub.files(repo_id)
    assert arrived == (not any(request.startswith("PUT /lfs/") for request in hub.requests))  # sent once


def test_a_private_repository_and_a_push_need_a_token(hub, client, result, tmp_path):
    client("push", result, REPO, private=True)
    client("use the token", "")
    try:
        assert "no token for the Hub" in client("push", result, REPO)["error"]
        assert "cannot be pulled" in client("pull", REPO, tmp_path / "pulled")["error"]
        assert not (tmp_path / "pulled").exists()
    finally:
        client("use the token", TOKEN)
    assert client("pull", REPO, tmp_path / "pulled") == str(tmp_path / "pulled")


def test_a_folder_that_is_not_whole_is_not_pushed(hub, client, result, tmp_path):
    shutil.copytree(result, tmp_path / "half")
    with open(tmp_path / "half" / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    assert "no whole safetensors file" in client("push", tmp_path / "half", REPO)["error"] and not hub.repositories


STRANGERS = {
    "a pickle and code": (
        {"pytorch_model.bin": b"pickle", "modeling.py": b"import os"},
        "no model and no adapter|no file",
    ),
    "weights cut off": ({"config.json": b"{}", "model.safetensors": b"\xff" * 4000}, "no whole safetensors file"),
    "a config that is none": ({"config.json": b"[1]", "model.safetensors": b""}, "holds no JSON object"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_what_a_stranger_pushed_is_looked_at_before_it_is_a_folder_here(case, hub, client, tmp_path):
    files, message = STRANGERS[case]
    hub.add("someone/else", files)
    refused = client("pull", "someone/else", tmp_path / "pulled")["error"]
    assert re.search(message, refused) and not list(tmp_path.iterdir())
    assert not any("pytorch_model.bin" in request or ".py" in request for request in hub.requests)


def test_a_name_that_leads_out_of_the_repository_is_not_written(hub, client, tmp_path, result):
    files = {name: (result / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.add("someone/climber", {**files, "plots/../../../../../../evil.png": b"evil", "plots/ok.png": b"fine"})
    client("pull", "someone/climber", tmp_path / "pulled")
    assert not list(tmp_path.parent.rglob("evil.png")) and not Path("evil.png").exists()


# ---- Data sets ----

CONFIGS = "configs:\n- config_name: default\n  data_files: "
ROWS = {"train.csv": b"a,b\n1,2\n3,4\n"}


@pytest.mark.parametrize(
    "place", ["HERE/secret.csv", "~/secret.csv", "../another/secret.csv", "file:HERE/secret.csv", "HUB/secret.csv"]
)
@pytest.mark.parametrize(
    "description",
    [
        {"README.md": "---\n{}\n---\n"},
        {"README.md": "# Rows\n", ".huggingface.yaml": "{}"},
        {".huggingface.yaml": "{}"},
    ],
    ids=["README", "README and YAML", "YAML"],
)
def test_data_that_name_files_elsewhere_are_refused(description, place, hub, client, tmp_path):
    (tmp_path / "secret.csv").write_text("a,b\n5,6\n")
    place = CONFIGS + place.replace("HERE", str(tmp_path)).replace("HUB", hub.url)
    said = {name: text.format(place).encode() for name, text in description.items()}
    hub.add("someone/rows", {**ROWS, **said})
    answer = client("load data", "someone/rows")
    assert re.search("'someone/rows' cannot be read: .*names data elsewhere.*it is refused", answer["error"])
    assert not any(part in request for request in hub.requests for part in ("secret", "train.csv"))


def test_data_are_looked_at_in_the_revision_and_with_the_token_that_they_are_loaded_with(hub, client):
    hub.add("someone/private-rows", ROWS, private=True)
    hub.repositories["someone/private-rows"].commit("v1", {**ROWS, "README.md": f"---\n{CONFIGS}/x\n---\n".encode()})
    answer = client("load data", "someone/private-rows", revision="v1", token=TOKEN)
    assert "names data elsewhere, /x" in answer["error"]
    assert client("load data", "someone/private-rows", token=TOKEN) == {"train": 2}
    assert "misspelt" in client("load data", "someone/no-rows")["error"]


@pytest.mark.parametrize("said", [{}, {"README.md": b"# Rows\n"}, {".huggingface.yaml": b"license: mit\n"}], ids=str)
def test_data_that_name_only_their_own_are_loaded_and_offline_from_the_cache(said, hub, tmp_path):
    hub.add("someone/rows", {**ROWS, **said})
    program = "from hf_fip.tasks.data import load_splits; print(load_splits('someone/rows').num_rows)"
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        env = {**environment(hub, tmp_path), **offline}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
        assert done.stdout == "{'train': 2}\n", done.stderr


@pytest.mark.slow
def test_what_a_recipe_pushes_is_pulled_elsewhere_and_measured_to_be_what_its_card_says(hub, tmp_path):
    maker, user = environment(hub, tmp_path / "maker"), environment(hub, tmp_path / "user", token=None)
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()

    def hf_fip(*arguments, env, folder) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "hf_fip.cli", *arguments]
        done = subprocess.run(command, env=env, cwd=tmp_path / folder, capture_output=True, text=True)
        assert TOKEN not in done.stdout + done.stderr
        return done

    small = ["--max_train_samples", "120", "--max_test_samples", "60", "--clean_fraction", "0.1", "--use_cpu"]
    push = ["--push_to_hub", "--hub_model_id", REPO, "--hub_strategy", "every_save", "--save_steps", "2"]
    made = hf_fip("purify", *small, "--max_steps", "4", *push, "--json", env=maker, folder="here")
    assert made.returncode == 0, made.stderr
    report, files = json.loads(made.stdout), hub.files(REPO)
    assert json.loads(files["report.json"]) == report and "hub_model_id" not in report["arguments"]
    assert set(files) == {".gitattributes", *digests(tmp_path / "here" / "outputs" / "purify_vit")}
    assert not any(
        TOKEN.encode() in content for _, found in hub.repositories[REPO].branches["main"] for content in found.values()
    )

    measured = hf_fip("evaluate", REPO, "--json", env=user, folder="elsewhere")
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout)
    assert found["measured"]["model"]["as_it_is"] == found["reported"] == report["after"]
    front = metadata_of(files["README.md"].decode())["model-index"][0]["results"][0]["metrics"]
    assert {figure["value"] for figure in front} == {*report["after"].values(), report["der"]}

    report["after"]["accuracy"] += 5
    hub.add("someone/liar", {**files, "report.json": json.dumps(report).encode()})
    told = hf_fip("evaluate", "someone/liar", env=user, folder="elsewhere")
    assert told.returncode == 3 and "says something else: ACC" in told.stdout
