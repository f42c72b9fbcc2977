"""Hostile recipes: nothing of them is executed, imported, fetched, or written outside of OUT and OUT.run."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml
from test_fit import write

from models.errors import UserError
from recipes import trust
from recipes.fit_errors import sentence

PLANTED = "open({path!r}, 'w').close()\nclass Muon: pass\nclass Logger: pass\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module of the working directory that leaves a file when it is imported; the path of that file."""
    (tmp_path / "here").mkdir()
    mark = tmp_path / "ran"
    (tmp_path / "here" / "planted_module.py").write_text(PLANTED.format(path=str(mark)))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    return mark


def popen(mark):
    """A class that starts a process, as a recipe names it."""
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(mark)]}}


def worker(mark):
    """A class of torch's own that runs a command."""
    return {
        "class_path": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        "init_args": {
            "entrypoint": "touch", "args": [str(mark)], "env": {}, "stdout": None, "stderr": None, "local_rank_id": 0,
            "numa_options": None,
        },
    }  # fmt: skip


HOSTILE = {
    "a nested class": lambda mark: {
        "strategy": {"class_path": "DDPStrategy", "init_args": {"ddp_comm_state": worker(mark)}}
    },
    "a nested class among other options": lambda mark: {
        "strategy": {"class_path": "DDPStrategy", "dict_kwargs": {"state": worker(mark)}}
    },
    "a function": lambda mark: {
        "strategy": {"class_path": "DDPStrategy", "init_args": {"ddp_comm_hook": "torch.utils.cpp_extension.load"}}
    },
    "a profiler that writes outside": lambda mark: {
        "profiler": {"class_path": "SimpleProfiler", "init_args": {"dirpath": str(mark), "filename": "x"}}
    },
    "a profiler that writes beside": lambda mark: {
        "profiler": {"class_path": "AdvancedProfiler", "init_args": {"dirpath": "../ran", "filename": "x"}}
    },
    "a logger that writes outside": lambda mark: {
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(mark)}}
    },
    "a logger whose version leads outside": lambda mark: {
        "logger": [{"class_path": "TensorBoardLogger", "init_args": {"save_dir": ".", "version": "../../ran"}}]
    },
    "a logger in a variable": lambda mark: {
        "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": ".", "sub_dir": "$HOME"}}
    },
    "a logger of a service": lambda mark: {"logger": {"class_path": "WandbLogger"}},
    "checkpoints outside": lambda mark: {
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(mark)}}]
    },
    "our own callback that replaces a folder": lambda mark: {
        "callbacks": [
            {
                "class_path": "app.callbacks.ModelFolder",
                "init_args": {"out": str(mark.parent / "mine"), "recipe": {}, "seed": 0},
            }
        ]
    },
    "our own callback that deletes": lambda mark: {
        "callbacks": [
            {"class_path": "app.callbacks.RunRecord", "init_args": {"recipe": {}, "stale": [str(mark.parent / "mine")]}}
        ]
    },
    "a plugin that unpickles": lambda mark: {"plugins": [{"class_path": "TorchCheckpointIO"}]},
    "an accelerator": lambda mark: {"accelerator": {"class_path": "lightning.pytorch.accelerators.CPUAccelerator"}},
    "a folder of its own": lambda mark: {"default_root_dir": str(mark)},
    "a registry": lambda mark: {"model_registry": "somebody/model"},
    "a command": lambda mark: {"callbacks": [popen(mark)]},
    "a module of the working directory": lambda mark: {"callbacks": [{"class_path": "planted_module.Muon"}]},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_recipe_does_nothing(kind, planted, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    trainer = yaml.safe_load(write(tmp_path / "plain.yaml").read_text())["trainer"]
    path = write(tmp_path / "recipe.yaml", trainer={**trainer, "max_steps": 3, **HOSTILE[kind](planted)})
    refused("fit", "-c", path, "--out", tmp_path / "model", words=["--trust"])
    assert not planted.exists()
    assert not (tmp_path / "model.run").exists()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_the_other_loops_have_the_same_policy(planted, refused, tmp_path):
    strategy = {"class_path": "DDPStrategy", "init_args": {"ddp_comm_state": worker(planted)}}
    path = write(tmp_path / "recipe.yaml", trainer__strategy=strategy)
    for verb in ("validate", "test", "predict"):
        refused(verb, "-c", path, "--ckpt_path", path, words=["SubprocessHandler", "--trust"])
    assert not planted.exists()


def test_nothing_that_a_message_shows_is_imported(planted):
    sentence('Parser key "trainer.logger": Not a valid subclass of Logger. Got value: list[planted_module.Logger]')
    sentence("Problem with given class_path 'planted_module.Muon': Option 'x' is not accepted")
    assert not planted.exists()


def test_a_class_in_the_architecture_or_in_a_file_beside_the_recipe(planted, refused, tmp_path):
    hostile = {"class_path": "planted_module.Muon"}
    path = write(tmp_path / "recipe.yaml", model__architecture={"width": 32, "attention": hostile})
    refused("fit", "-c", path, "--out", tmp_path / "model", words=["planted_module.Muon"])
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({"max_steps": 1, "callbacks": [hostile]}))
    path = write(tmp_path / "recipe.yaml", trainer=str(tmp_path / "trainer.yaml"))
    refused("fit", "-c", path, "--out", tmp_path / "model", words=["trainer must hold keys and values"])
    assert not planted.exists()


@pytest.mark.parametrize(
    ("verb", "key"),
    [("quantize", "method"), ("quantize", "layers"), ("prune", "method"), ("distill", "losses"), ("evaluate", "data")],
)
def test_a_class_in_a_recipe_of_another_verb(verb, key, planted, refused, teacher, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({key: {"kind": [{"class_path": "planted_module.Muon"}]}}))
    refused(verb, "-c", recipe, teacher, "--out", tmp_path / "out", words=["planted_module.Muon"])
    recipe.write_text(yaml.safe_dump({key: {"class_path": "planted_module.Muon"}}))
    refused(verb, "-c", recipe, teacher, "--out", tmp_path / "out", words=["planted_module.Muon"])
    if verb in ("quantize", "prune", "distill"):
        recipe.write_text(yaml.safe_dump({"stages": [{"stage": verb, key: {"class_path": "planted_module.Muon"}}]}))
        refused("run", recipe, "--model", teacher, "--out", tmp_path / "out", words=["planted_module.Muon"])
    assert not planted.exists()


@pytest.fixture
def server():
    """An HTTP server that serves one recipe, and the paths that were asked for."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"max_steps: 1\n")

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    found = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/recipe.yaml", asked
    found.shutdown()
    found.server_close()


def test_a_recipe_is_never_fetched(server, refused, teacher, tmp_path):
    address, asked = server
    path = write(tmp_path / "recipe.yaml", trainer=address)
    refused("fit", "-c", path, "--out", tmp_path / "model")
    path = write(tmp_path / "recipe.yaml", model__architecture=address)
    refused("fit", "-c", path, "--out", tmp_path / "model")
    plain = write(tmp_path / "plain.yaml")
    for arguments in (
        ["-c", address], ["-c", plain, "--trainer", address], ["-c", plain, "--data", address],
        ["-c", plain, "--data", address.replace(".yaml", ".txt")], ["-c", plain, "--trainer.callbacks", address],
    ):  # fmt: skip
        refused("fit", *arguments, "--out", tmp_path / "model")
    refused("quantize", teacher, "-c", address, "--out", tmp_path / "model")
    refused("quantize", teacher, f"--config={address}", "--out", tmp_path / "model")
    refused("run", address, "--model", teacher, "--out", tmp_path / "model")
    refused("sweep", address, "--out", tmp_path / "model")
    assert asked == []


NEEDED = {
    "lightning.pytorch.callbacks.EarlyStopping": {"monitor": "loss"},
    "lightning.pytorch.callbacks.GradientAccumulationScheduler": {"scheduling": {0: 1}},
}


@pytest.mark.parametrize("place", trust.HARMLESS)
def test_every_class_of_the_list_is_allowed_in_its_place(place, refused, tmp_path):
    """The parser takes each of them, with its defaults: what is refused is the device, which is looked at later."""
    given = [
        {"class_path": name, "init_args": {"save_dir": "logs"} if "loggers" in name else NEEDED.get(name, {})}
        for name in trust.HARMLESS[place]
    ]
    recipes = [write(tmp_path / "recipe.yaml")]
    lists = place in ("trainer.callbacks", "trainer.logger", "trainer.plugins")
    for number, value in enumerate([given] if lists else given):
        keys = {}
        for key in reversed(place.split(".")):
            keys = {key: keys or value}
        recipes.append(tmp_path / f"{number}.yaml")
        recipes[-1].write_text(yaml.safe_dump(keys))
        arguments = [word for recipe in (recipes[0], recipes[-1]) for word in ("-c", recipe)]
        refused("fit", *arguments, "--out", tmp_path / "model", "--device", "cuda", words=["--device cpu"])


def test_the_sentence_for_another_class_names_those_of_the_list():
    assert all(one.why.endswith(".") for kinds in trust.HARMLESS.values() for one in kinds.values())
    with pytest.raises(UserError, match=r"trainer.profiler names os.system; without --trust it may name AdvancedPro"):
        trust.check_recipe({"trainer": {"profiler": {"class_path": "os.system"}}})


def test_loggers_and_profilers_write_below_the_folder_of_the_run(espalier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "figures", "name": "", "version": "first"}}
    profiler = {"class_path": "SimpleProfiler", "init_args": {"dirpath": "times", "filename": "times"}}
    path = write(tmp_path / "recipe.yaml", trainer__logger=logger, trainer__profiler=profiler, trainer__max_steps=2)
    status, output = espalier("fit", "-c", path, "--out", tmp_path / "model")
    assert status == 0, output.err
    assert (tmp_path / "model.run" / "figures" / "first").is_dir()
    assert list((tmp_path / "model.run" / "times").iterdir())
    assert {found.name for found in tmp_path.iterdir()} == {"recipe.yaml", "model", "model.run"}
