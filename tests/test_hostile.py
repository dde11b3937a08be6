"""Files from strangers who mean harm: each is refused with a clear error or does nothing, and nothing is executed.

One table. Each case spoils a good folder (or writes a bad one), and names what is done with it and what is said. A
canary file would tell that code ran; and no file anywhere around may change, appear or go.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from datasets import Dataset
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from hf_fip import SingularValueConfig
from hf_fip.attacks import make_attack
from hf_fip.hub.card import card_of
from hf_fip.hub.load import load_model
from hf_fip.hub.push import push_folder
from hf_fip.hub.safety import Trust
from hf_fip.scripts.arguments import AttackArguments
from hf_fip.scripts.recorded import attack_of
from hf_fip.scripts.terminal import with_config
from hf_fip.tasks.clouds import load_clouds
from hf_fip.tasks.data import load_images
from hf_fip.tasks.image_architectures import small_vit
from hf_fip.tasks.image_classification import PixelDataset, load_image_classifier
from hf_fip.tasks.pairs import load_pairs
from hf_fip.tasks.seq2seq import load_tokenizer, train_tokenizer

WEIGHTS, CONFIG = "model.safetensors", "config.json"


# What a stranger does to a folder: each gets the folder, and the canary beside it


class Evil:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (Path.write_text, (self.canary, "executed"))


def pickled(*names, drop=()):
    """Pickles under these names, which execute when they are read."""

    def spoil(folder, canary):
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Evil(canary)))
        for name in drop:
            (folder / name).unlink()

    return spoil


def torch_pickled(folder, canary):
    torch.save({"weight": torch.ones(2), "evil": Evil(canary)}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def code(**config):
    """Code in `evil.py` that the config asks for."""

    def spoil(folder, canary, name=CONFIG):
        (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).write_text('executed')\n")
        change(name, **config)(folder, canary)

    return spoil


def code_in(name, **config):
    return lambda folder, canary: code(**config)(folder, canary, name)


def change(name=CONFIG, /, **values):
    """Other values in a JSON file."""

    def spoil(folder, canary):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | values))

    return spoil


def write(name, content):
    """A file of these bytes."""

    def spoil(folder, canary):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def header(text, body=b"", length=None):
    """A safetensors file with this header."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return write(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text + body)


def tensor(shape, end, dtype="F32", begin=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def linked(name, target):
    """A link in place of a file; the file itself is moved out of the folder."""

    def spoil(folder, canary):
        if (folder / name).exists():
            shutil.move(folder / name, folder.parent / target)
        os.symlink(f"../{target}", folder / name)

    return spoil


def self_linked(folder, canary):
    (folder / WEIGHTS).unlink()
    os.symlink(WEIGHTS, folder / WEIGHTS)


def data_script(folder, canary):
    images_in_classes("readme.txt", "x")(folder, canary)
    (folder / f"{folder.name}.py").write_text(f"open({str(canary)!r}, 'w')\n")


def sharded(*names):
    """Weights that the index says lie in these files."""

    def spoil(folder, canary):
        shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
        places = [name.replace("HERE", str(folder.parent)) for name in names]
        index = {"weight_map": {str(i): place for i, place in enumerate(places)}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return spoil


def pickled_shards(folder, canary):
    torch.save({"a": torch.ones(1)}, folder.parent / "outside.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.bin"}}))
    (folder / WEIGHTS).unlink()


def adapter(**config):
    """An adapter with other values in its config."""

    def spoil(folder, canary):
        from peft import get_peft_model

        shutil.copytree(folder, folder.parent / "base")
        get_peft_model(load_model(folder), SingularValueConfig(target_modules=["classifier"])).save_pretrained(folder)
        change("adapter_config.json", **config)(folder, canary)

    return spoil


def adapter_pickled(folder, canary):
    adapter()(folder, canary)
    pickled("adapter_model.bin", drop=["adapter_model.safetensors"])(folder, canary)


def parquet_that_names(path):
    """A row that is an image by path, elsewhere."""

    def spoil(folder, canary):
        there = {"bytes": None, "path": path.replace("HERE", str(folder.parent))}
        parquet.write_table(pa.table({"image": [there] * 4, "label": [0, 1, 0, 1]}), folder / "train.parquet")

    return spoil


def yaml_that_names(place):
    """A parquet file outside, and a `.huggingface.yaml` that names it under a harmless README."""

    def spoil(folder, canary):
        rows = pa.table({"image": [{"bytes": b"", "path": None}] * 4, "label": [0, 1, 0, 1]})
        for file in (folder / "train.parquet", folder.parent / "secret.parquet"):
            parquet.write_table(rows, file)
        configs = "configs:\n- config_name: default\n  data_files: "
        write("README.md", f"---\n{configs}train.parquet\n---\n")(folder, canary)
        write(".huggingface.yaml", configs + place.replace("HERE", str(folder.parent)))(folder, canary)

    return spoil


def saved_to_disk(folder, canary):
    Dataset.from_dict({"image": [1, 2], "label": [0, 1]}).save_to_disk(folder / "set")
    for file in (folder / "set").iterdir():
        shutil.move(file, folder / file.name)
    (folder / "set").rmdir()
    shutil.move(folder / "data-00000-of-00001.arrow", folder.parent / "outside.arrow")
    change("state.json", _data_files=[{"filename": "../outside.arrow"}])(folder, canary)


def images_in_classes(name, content):
    """A folder of images, one of which is these bytes."""

    def spoil(folder, canary):
        import PIL.Image

        for label in "ab":
            (folder / label).mkdir()
            for number in range(3):
                PIL.Image.new("L", (8, 8), 30 * number).save(folder / label / f"{number}.png")
        write(name, content)(folder, canary)

    return spoil


def huge_image() -> bytes:
    """A PNG that says it is 60,000 by 60,000 pixels."""
    import zlib

    start = struct.pack(">II5B", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + start
    end = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(start)) + chunk + end + b"\x00\x00\x00\x00IEND\xaeB`\x82"


def pickled_cloud(folder, canary):
    (folder / "a").mkdir()
    np.save(folder / "a" / "cloud.npy", np.array([Evil(canary)], dtype=object), allow_pickle=True)


def an_attack(**changes):
    """The folder of a victim whose attack says something else."""

    def spoil(folder, canary):
        make_attack("badnets").save_pretrained(folder)
        change("attack.json", **changes)(folder, canary)

    return spoil


def both(*spoilers):
    return lambda folder, canary: [spoil(folder, canary) for spoil in spoilers]


# What is done with the folder


def model(folder):
    load_image_classifier(str(folder))


def trusted(folder):
    load_image_classifier(str(folder), trust=Trust(pickle=True))


def on_its_base(folder):
    load_image_classifier(str(folder), base_model=str(folder.parent / "base"))


def tokenizer(folder):
    load_tokenizer(str(folder))


def images(folder):
    found = load_images(str(folder))
    PixelDataset(found.train, small_vit(["a", "b"], 8, 1)[1], 1)


def clouds(folder):
    load_clouds(str(folder))


def pairs(folder):
    load_pairs(str(folder))


def attack(folder):
    attack_of(AttackArguments(), str(folder), 10).apply(np.zeros((8, 8, 3), dtype=np.uint8))


def card(folder):
    card_of(folder)


def pushed(folder):
    push_folder(folder, "someone/model")


def run_config(folder):
    with_config(["--config", str(folder / "run.yaml")])


NESTED = "[" * 200_000
LABEL = {"0": "x" * 10_000_000, "1": "b"}
AUTO = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
LOADS = "loads, and nothing runs"

CASES = {
    # pickles that execute when they are read
    "weights in a pickle": (model, torch_pickled, "no file named model.safetensors"),
    "weights in a pickle, vouched for": (trusted, torch_pickled, "pickle in .* is refused: UnpicklingError"),
    "a bare pickle, vouched for": (trusted, pickled("pytorch_model.bin", drop=[WEIGHTS]), "pickle in .* is refused"),
    "shards of a pickle elsewhere, vouched for": (trusted, pickled_shards, "names files elsewhere|leads out of"),
    "a pickle called safetensors": (model, pickled(WEIGHTS), "no whole safetensors file"),
    "a pickle called config": (model, pickled(CONFIG), "config.json cannot be read"),
    "pickles beside a good model": (model, pickled("training_args.bin", "optimizer.pt", "scheduler.pt"), LOADS),
    "an adapter in a pickle": (on_its_base, adapter_pickled, "adapter is loaded from safetensors only"),
    "a cloud in a pickle": (clouds, pickled_cloud, "cannot be loaded when allow_pickle=False"),
    "data in a pickle": (images, pickled("train.pkl"), "cannot be read"),
    "a tokenizer in a pickle": (tokenizer, pickled("tokenizer.json"), "tokenizer.json cannot be read"),
    "a trigger in a pickle": (attack, both(an_attack(), pickled("attack.safetensors")), "is not valid"),
    # safetensors whose header is cut off or lies
    "an empty file": (model, write(WEIGHTS, b""), "no whole safetensors file"),
    "half a header": (model, header({}, length=10_000), "no whole safetensors file"),
    "a header of an exabyte": (model, header({}, length=2**60), "no whole safetensors file"),
    "a header that is no JSON": (model, header(b"{weights}"), "no whole safetensors file"),
    "a header that is no UTF-8": (model, header(b'{"\xff\xfe": 1}'), "no whole safetensors file"),
    "a header nested deeply": (model, header(NESTED.encode()), "no whole safetensors file"),
    "less data than the header says": (model, header({"a": tensor([8], 32)}, b"1234"), "no whole safetensors file"),
    "more data than the header says": (model, header({"a": tensor([1], 4)}, bytes(64)), "no whole safetensors file"),
    "a shape that does not fit": (model, header({"a": tensor([2**40], 4)}, bytes(4)), "no whole safetensors file"),
    "a shape that overflows": (model, header({"a": tensor([2**40] * 4, 0)}), "no whole safetensors file"),
    "a negative shape": (model, header({"a": tensor([-1], 4)}, bytes(4)), "no whole safetensors file"),
    "tensors over one another": (
        model,
        header({"a": tensor([2], 8), "b": tensor([2], 12, begin=4)}, bytes(12)),
        "no whole safetensors file",
    ),
    "a type that is none": (model, header({"a": tensor([1], 4, "PICKLE")}, bytes(4)), "no whole safetensors file"),
    # configs that ask for all the memory there is
    "a width of a billion": (model, change(hidden_size=10**9), "hidden_size=1000000000 is absurd"),
    "a billion layers": (model, change(num_hidden_layers=10**9), "num_hidden_layers=1000000000 is absurd"),
    "a million layers": (model, change(num_hidden_layers=10**6), "a far larger model than its weights"),
    "a million wide": (model, change(intermediate_size=10**6), "a far larger model than its weights"),
    "images a million wide": (model, change(image_size=10**6), "a far larger model than its weights"),
    "a trillion classes": (model, change(num_labels=10**12), "num_labels=1000000000000 is absurd"),
    "pixels by the billion": (
        model,
        change("preprocessor_config.json", size={"height": 10**6, "width": 10**6}),
        "absurd",
    ),
    "a label of 10 MB": (model, change(id2label=LABEL), "10,0.* bytes, and more than 4,194,304 are refused"),
    "a config nested deeply": (model, write(CONFIG, NESTED), "config.json cannot be read"),
    "a config that is no UTF-8": (model, write(CONFIG, b'{"model_type": "\xff"}'), "config.json cannot be read"),
    "a config that is no object": (model, write(CONFIG, "[1, 2]"), "holds no JSON object"),
    "an adapter of a billion ranks": (on_its_base, adapter(rank=10**9), "rank=1000000000 is absurd"),
    "a picture of 3.6 gigapixels": (images, images_in_classes("a/x.png", huge_image()), "cannot be read"),
    "a trigger of a billion pixels": (attack, an_attack(options={"patch_size": 10**9}), "not valid|patch_size"),
    # code of their own
    "a model with code": (model, code(model_type="evil", auto_map=AUTO), "needs code of its own, which is not run"),
    "code beside a known model": (model, code(auto_map=AUTO), LOADS),
    "a processor with code": (
        model,
        code_in(
            "preprocessor_config.json",
            image_processor_type="Evil",
            auto_map={"AutoImageProcessor": "evil.Processor"},
        ),
        "has no image processor",
    ),
    "a tokenizer with code": (
        tokenizer,
        code_in(
            "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]}
        ),
        "needs code of its own, which is not run",
    ),
    "data with a script": (images, data_script, "cannot be read.*scripts are no longer supported"),
    "attention from the Hub": (
        model,
        change(attn_implementation="evil/kernel"),
        "code from the Hub, which is not run",
    ),
    "a name that is no model": (model, change(architectures=["Trainer"]), "which transformers does not have"),
    "an abstract model": (model, change(architectures=["PreTrainedModel"]), "lacks the head"),
    "weights from elsewhere": (model, change(model_args={"checkpoint_path": "/x.pth"}), "weights from elsewhere"),
    "an architecture of another repository": (model, change(architecture="hf-hub:evil/model"), "no name of an arch"),
    "quantised": (model, change(quantization_config={"quant_method": "evil"}), "quantised"),
    "an adapter that imports": (on_its_base, adapter(megatron_config={"a": 1}, megatron_core="evil"), "elsewhere"),
    "an adapter on a commit above": (on_its_base, adapter(revision="../../evil"), "is no branch, tag or commit"),
    "an adapter of adapters": (on_its_base, adapter(peft_type="XLORA"), "elsewhere"),
    "YAML that makes objects": (
        run_config,
        write("run.yaml", "a: !!python/object/apply:os.getcwd []"),
        "cannot be read",
    ),
    # names that lead elsewhere
    "shards above": (model, sharded("../outside.safetensors"), "leads out of"),
    "shards by full path": (model, sharded("HERE/outside.safetensors"), "leads out of"),
    "weights that are a link": (model, linked(WEIGHTS, "outside.safetensors"), "leads out of"),
    "a config that is a link": (model, linked(CONFIG, "outside.json"), "leads out of"),
    "a link to itself": (model, self_linked, "cannot be followed|leads out of|no file named"),
    "data that are a link": (images, linked("train.parquet", "outside.parquet"), "leads out of"),
    "data above, in the README": (
        images,
        write("README.md", "---\nconfigs:\n- config_name: default\n  data_files: ../*.parquet\n---\n"),
        "names data elsewhere",
    ),
    "data by address, in the README": (
        images,
        write("README.md", "---\nconfigs:\n- config_name: default\n  data_files: https://evil.example/x.csv\n---\n"),
        "names data elsewhere",
    ),
    **{
        f"data by {how}, in .huggingface.yaml": (images, yaml_that_names(place), "names data elsewhere")
        for how, place in {
            "full path": "HERE/secret.parquet",
            "a path that is none at first sight": "file:HERE/secret.parquet",
            "a path in a cache": "simplecache::HERE/secret.parquet",
            "address": "https://evil.example/x.csv",
        }.items()
    },
    "data above, in pairs in .huggingface.yaml": (
        images,
        write(".huggingface.yaml", "- [configs, [{config_name: default, data_files: ../*.parquet}]]"),
        "names data elsewhere",
    ),
    "a .huggingface.yaml that is no UTF-8": (images, write(".huggingface.yaml", b"\xff"), "yaml cannot be read"),
    "data above, in state.json": (images, saved_to_disk, "leads out of"),
    "an image by path": (images, parquet_that_names("HERE/secret.png"), "is a path elsewhere"),
    "an image by address": (images, parquet_that_names("http://127.0.0.1:9/x.png"), "is a path elsewhere"),
    "an image above, in the metadata": (
        images,
        images_in_classes("metadata.csv", "file_name,label\n../secret.png,a\n"),
        "cannot be read",
    ),
    "a link in what is pushed": (pushed, linked(CONFIG, "outside.json"), "leads out of"),
    # text that is none
    "pairs that are no UTF-8": (pairs, write("train.tsv", b"a\tb\n\xff\xfe\tc\n"), "is not UTF-8 text"),
    "an attack that is no UTF-8": (attack, both(an_attack(), write("attack.json", b"\xff")), "is not valid"),
    "an attack nested deeply": (attack, both(an_attack(), write("attack.json", NESTED)), "is not valid"),
    "an attack of another name": (attack, an_attack(name="../../evil"), "is not an attack"),
    "a report nested deeply": (card, write("report.json", NESTED), "report.json cannot be read"),
    "a report that is no object": (card, write("report.json", "3"), "holds no JSON object"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict:
    """A good folder of each kind, by what is done with it; the others begin with an empty one."""
    place = tmp_path_factory.mktemp("good")
    network, processor = small_vit(["a", "b"], 8, 1)
    network.save_pretrained(place / "model")
    processor.save_pretrained(place / "model")
    sentences = Dataset.from_dict({"source": ["one two"], "target": ["uno dos"]})
    train_tokenizer(sentences, 300).save_pretrained(place / "tokenizer")
    return {**dict.fromkeys((model, trusted, on_its_base, pushed), place / "model"), tokenizer: place / "tokenizer"}


def everything(place: Path) -> dict[str, str]:
    """Every file below a place, with its content; links as what they say."""
    found = {}
    for path in place.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_executed_and_nothing_else_is_touched(case, good, tmp_path, monkeypatch):
    use, spoil, said = CASES[case]
    folder, canary = tmp_path / "here", tmp_path / "canary"
    shutil.copytree(good[use], folder) if use in good else folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spoil(folder, canary)
    (tmp_path / "secret.png").write_bytes(b"secret")
    found = everything(tmp_path)
    if said is LOADS:
        use(folder)
    else:
        with pytest.raises(ValueError, match=said) as refused:
            use(folder)
        assert len(str(refused.value)) < 2000 and "\x1b" not in str(refused.value)
    assert not canary.exists()
    assert everything(tmp_path) == found


def test_there_are_many():
    assert len(CASES) >= 40


def test_the_canary_would_tell(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
    assert (tmp_path / "canary").read_text() == "executed"


def test_a_pickle_of_weights_is_converted_for_those_who_vouch_for_it(good, tmp_path):
    shutil.copytree(good[model], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / WEIGHTS).unlink()
    with pytest.warns(UserWarning, match="--allow_pickle"):
        found = load_model(tmp_path / "model", trust=Trust(pickle=True))
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    expected = load_model(tmp_path / "model")
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_code_of_a_model_runs_for_those_who_vouch_for_it(good, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(good[model], tmp_path / "mine")
    (tmp_path / "mine" / "own.py").write_text(
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own'\n"
        "class OwnForImageClassification(ViTForImageClassification):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnForImageClassification"}
    change(model_type="own", auto_map=auto, architectures=["OwnForImageClassification"])(tmp_path / "mine", None)
    with pytest.raises(ValueError, match="--trust_remote_code"):
        load_model(tmp_path / "mine")
    with pytest.warns(UserWarning, match="--trust_remote_code"):
        found = load_model(tmp_path / "mine", "ForImageClassification", trust=Trust(remote_code=True))
    assert type(found).__name__ == "OwnForImageClassification"


def test_the_links_of_the_hubs_own_cache_are_fine(good, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(good[model].iterdir()):
        shutil.copy(file, blobs / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    load_image_classifier(str(snapshot))


def test_yaml_written_of_hostile_names_is_read_as_it_was():
    from huggingface_hub import ModelCardData

    name = 'a: b\n- !!python/object/apply:os.system ["x"]\n---\n{{ c }} & *d'
    assert yaml.safe_load(ModelCardData(model_name="m", tags=[name]).to_yaml())["tags"] == [name]
