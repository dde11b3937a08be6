"""The command `hf-fip`: each word is a recipe's main function, found, run and reported as the recipe is."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_fip import __version__, cli
from hf_fip.attacks import attack_names
from hf_fip.scripts import tasks
from hf_fip.scripts.terminal import warn_if_costly, with_config

SCRIPTS = Path(tasks.__file__).parent


def hf_fip(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "hf_fip.cli", *arguments], capture_output=True, text=True, **options)


def in_process(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Run the command in this process: gives exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["hf-fip", *arguments])
    monkeypatch.setattr("hf_fip.scripts.terminal.quiet_libraries", lambda: None)  # for good, in this process
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_each_word_names_a_main_function(word):
    for task in tasks.TASKS:
        module = cli.COMMANDS[word][0].format(task=task)
        assert callable(importlib.import_module(f"hf_fip.scripts.{module}").main)


@pytest.mark.parametrize("word", ["purify", "backdoor"])
def test_each_task_has_a_line_and_a_recipe(word):
    there = {path.stem.removeprefix(f"{word}_") for path in SCRIPTS.glob(f"{word}_*.py")}
    assert there == set(tasks.TASKS)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_word_and_the_exit_codes(arguments, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, *arguments)
    for word in cli.COMMANDS:
        assert any(line.startswith(f"  {word} ") for line in out.splitlines())
    assert code == 0 and cli.EXIT_CODES in out


def test_version(monkeypatch, capsys):
    assert in_process(monkeypatch, capsys, "--version") == (0, f"{__version__}\n", "")


def test_an_unknown_word_ends_with_2_and_the_list(monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, "purge")
    assert code == 2 and "'purge' is not a word" in err and "backdoor" in err and not out


def test_a_word_takes_its_recipes_arguments_and_reports_errors_in_a_line():
    ended = hf_fip("attacks", "unheard")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith("error: 'unheard' is not an attack: choose one of badnets, blend")


@pytest.mark.parametrize("word", ["attacks", "compare", "card", "push", "pull", "demo-app", "completion"])
def test_a_wrong_argument_of_a_short_word_is_one_line_too(word, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, word, "--smells")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: ") and err.endswith("(--help lists all arguments)\n")


def test_attacks_lists_every_attack_and_the_options_of_one(monkeypatch, capsys):
    listed = in_process(monkeypatch, capsys, "attacks")[1]
    assert [name for name in attack_names() if f" {name} " not in listed] == []
    told = in_process(monkeypatch, capsys, "attacks", "badnets")[1]
    assert "patch_size=3" in told and "alpha=1.0" in told


TASKS = {
    "none": ([], "image", []),
    "a word": (["pointcloud", "--seed", "1"], "pointcloud", ["--seed", "1"]),
    "an argument": (["--seed", "1", "--task", "seq2seq"], "seq2seq", ["--seed", "1"]),
    "an argument of one word": (["--task=video", "--seed", "1"], "video", ["--seed", "1"]),
}


@pytest.mark.parametrize("case", TASKS)
def test_a_task_is_a_word_or_an_argument_and_images_by_default(case):
    arguments, task, rest = TASKS[case]
    assert tasks.take_task(arguments) == task and arguments == rest


@pytest.mark.parametrize("arguments", [["smells"], ["--task"], ["--task", "smells"]])
def test_an_unknown_task_lists_those_there_are(arguments, monkeypatch, capsys):
    code, _, err = in_process(monkeypatch, capsys, "purify", *arguments)
    assert code == 1 and "is not a task: choose one of image," in err and err.count("\n") == 1


def test_purify_takes_the_task(monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "purify", "pointcloud", "--help")
    assert code == 0 and "usage: hf-fip purify" in out and "--num_points" in out
    code, out, _ = in_process(monkeypatch, capsys, "tasks")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(tasks.TASKS)


def test_a_config_file_gives_arguments_which_the_command_line_wins_over(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 5\neta_f: 0.1\ndisturb: false\nlabels: [a, b]\nseed:\nlr_scheduler_kwargs: {a: 1}\n")
    for config in (["--config", str(file)], [f"--config={file}"]):
        assert with_config(["pointcloud", "--eta_f", "0.2", *config]) == [
            *("pointcloud", "--max_steps", "5", "--eta_f", "0.1", "--disturb", "False", "--labels", "a", "b"),
            *("--lr_scheduler_kwargs", '{"a": 1}', "--eta_f", "0.2"),
        ]


CONFIGS = {"no mapping": "- a", "no YAML": "a: [", "no file": None, "an unknown name": "learning_rat: 1"}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_file_that_cannot_be_is_refused_in_a_line(case, tmp_path, monkeypatch, capsys):
    if CONFIGS[case] is not None:
        (tmp_path / "run.yaml").write_text(CONFIGS[case])
    code, _, err = in_process(monkeypatch, capsys, "purify", "--config", str(tmp_path / "run.yaml"))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert "run.yaml" in err or "unknown: --learning_rat" in err


def test_json_alone_goes_to_stdout(tmp_path):
    small = ["--max_train_samples", "80", "--max_test_samples", "40", "--clean_fraction", "0.2", "--use_cpu"]
    arguments = ["--num_train_epochs", "1", "--output_dir", "out", "--json", "--attack", "none"]
    done = hf_fip("backdoor", *small, *arguments, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "saved to out" in done.stderr


@pytest.mark.parametrize(("after", "warned"), [(90.0, False), (85.6, False), (85.4, True), (0.0, True)])
def test_a_purification_that_costs_much_says_so_and_what_to_try(after, warned, capsys):
    warn_if_costly({"bleu": 90.0}, {"bleu": after}, "bleu", 0.1)
    said = capsys.readouterr().out
    assert ("more than 5% of the clean BLEU is gone" in said and "--learning_rate below 0.1" in said) is warned
    assert bool(said) is warned


def test_the_completion_of_a_shell_knows_words_tasks_and_arguments(monkeypatch, capsys, tmp_path):
    code, script, _ = in_process(monkeypatch, capsys, "completion", "bash")
    assert code == 0
    (tmp_path / "complete.sh").write_text(script)

    def completed(*words) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        asked = (
            f"source complete.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _hf_fip; echo ${{COMPREPLY[@]}}"
        )
        return set(subprocess.check_output(["bash", "-c", asked], cwd=tmp_path, text=True).split())

    assert completed("hf-fip", "pu") == {"purify", "push", "pull"}
    assert completed("hf-fip", "purify", "point") == {"pointcloud"}
    assert completed("hf-fip", "purify", "pointcloud", "--num_p") == {"--num_points"}
    assert completed("hf-fip", "push", "--create") == {"--create_pr"}
    assert completed("hf-fip", "card", "compl") == {"complete.sh"}
