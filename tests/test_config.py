import subprocess
import sys

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_fip import FIPConfig, FIPSeq2SeqConfig
from hf_fip.config import FAST_FIP

FIP_FIELDS = {
    "eta_f": 0.2,
    "eta_r": 3.0,
    "trace_form": "trace",
    "eta_f_schedule": "cosine",
    "fisher_labels": "empirical",
    "trace_estimator": "signed_sum",
    "trace_gradient": "double_backward",
    "max_loss_rise": 1.5,
    "trace_interval": 2,
    "trace_epsilon": 0.5,
    "diagonal_samples": 7,
    "fisher_chunk_size": 3,
}
CONFIGS = pytest.mark.parametrize("config_class", [FIPConfig, FIPSeq2SeqConfig])


@CONFIGS
def test_fields_come_back_from_the_dictionary_and_the_command_line(config_class, tmp_path):
    config = config_class(str(tmp_path), **FIP_FIELDS)
    assert {name: config.to_dict()[name] for name in FIP_FIELDS} == FIP_FIELDS
    assert config_class(**config.to_dict()).to_dict() == config.to_dict()

    words = [word for name, value in FIP_FIELDS.items() for word in (f"--{name}", str(value))]
    (parsed,) = HfArgumentParser(config_class).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
    assert {name: getattr(parsed, name) for name in FIP_FIELDS} == FIP_FIELDS


@CONFIGS
def test_the_output_folder_is_the_first_argument(config_class, tmp_path):
    assert config_class(str(tmp_path)).output_dir == str(tmp_path)


def test_configs_are_training_arguments(tmp_path):
    assert isinstance(FIPConfig(str(tmp_path)), TrainingArguments)
    generating = FIPSeq2SeqConfig(str(tmp_path), predict_with_generate=True, generation_max_length=9)
    assert isinstance(generating, Seq2SeqTrainingArguments)
    assert (generating.predict_with_generate, generating.generation_max_length) == (True, 9)


@CONFIGS
def test_every_field_of_fip_is_documented(config_class):
    for name in FIP_FIELDS:
        assert f"\n        {name} (" in config_class.__doc__


@CONFIGS
def test_help_names_the_choices(config_class):
    text = " ".join(HfArgumentParser(config_class).format_help().split())
    for choices in (
        "{log_trace,trace}",
        "{linear,constant,cosine}",
        "{sampled,empirical}",
        "{sampled_sum,signed_sum,exact}",
        "{finite_difference,double_backward}",
    ):
        assert choices in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "momentum=0.9"),
        ({"optim": "sgd"}, "momentum=0.9"),
        ({"optim_args": "momentum=0"}, "momentum=0"),
        ({"optim": "adamw_torch"}, None),
        ({"optim": "rmsprop", "optim_args": "momentum=0.9"}, "momentum=0.9"),
    ],
)
def test_momentum_is_the_default_of_sgd_alone(options, expected, tmp_path):
    assert FIPConfig(str(tmp_path), **options).optim_args == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta_f": -0.1}, "eta_f=-0.1"),
        ({"eta_r": -1}, "eta_r=-1"),
        ({"eta_f": float("nan")}, "eta_f=nan"),
        ({"eta_r": float("inf")}, "eta_r=inf"),
        ({"trace_epsilon": 0}, "trace_epsilon=0"),
        ({"trace_epsilon": float("nan")}, "trace_epsilon=nan"),
        ({"trace_interval": 0}, "trace_interval=0"),
        ({"trace_interval": 2.5}, "trace_interval=2.5 has to be a whole number"),  # due at 5, and as strong as 2.5
        ({"diagonal_samples": 0}, "diagonal_samples=0"),
        ({"fisher_chunk_size": 0}, "fisher_chunk_size=0"),
        ({"trace_form": "log"}, "trace_form='log' is not one of log_trace, trace"),
        ({"eta_f_schedule": "step"}, "eta_f_schedule='step' is not one of linear, constant, cosine"),
        ({"fisher_labels": "true"}, "fisher_labels='true' is not one of"),
        ({"trace_estimator": "sum"}, "trace_estimator='sum' is not one of"),
        ({"trace_gradient": "autograd"}, "trace_gradient='autograd' is not one of"),
        ({"trace_estimator": "exact"}, "trace_gradient='double_backward'"),  # with the default finite difference
        ({"fisher_labels": "empirical"}, "trace_estimator='signed_sum'"),  # with the default sampled_sum
    ],
)
def test_what_does_not_exist_or_fit_is_refused_with_the_way_out(options, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        FIPConfig(str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_importing_the_package_is_lazy():
    program = (
        "import sys, hf_fip\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert {'FIPConfig', 'FIPTrainer'} <= set(dir(hf_fip))\n"
        "try:\n"
        "    hf_fip.NoSuchThing\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "module 'hf_fip' has no attribute 'NoSuchThing'\n", answer.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 0.001), ({"bf16": True}, 0.01), ({"bf16": True, "trace_epsilon": 0.002}, 0.002)],
)
def test_the_finite_difference_step_is_longer_in_half_precision(tmp_path, given, expected):
    assert FIPConfig(str(tmp_path), use_cpu=True, **given).trace_epsilon == expected


@CONFIGS
def test_fast_fip_has_defaults_of_its_own_that_give_way(config_class, tmp_path):
    config = config_class.fast_fip(str(tmp_path), eta_f=0.5)
    assert isinstance(config, config_class)
    assert config.eta_f == 0.5
    for name in FAST_FIP.keys() - {"eta_f"}:
        assert getattr(config, name) == FAST_FIP[name] != getattr(config_class(str(tmp_path)), name)


@pytest.mark.parametrize(("precision", "epsilon"), [("no", 0.001), ("bf16", 0.01), ("fp16", 0.01)])
def test_the_precision_of_a_launcher_sets_the_step_of_finite_differences(precision, epsilon, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert FIPConfig(str(tmp_path), use_cpu=True).trace_epsilon == epsilon
