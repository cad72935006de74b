"""Damages of the settings that tell alpha: PEFT's beside a file, and those that ``diffusers`` keeps in its header."""

import json
import os

from tests.damage.files import loaded, resave, write_config, write_diffusers_twin, write_peft_twin
from tests.damage.registry import damages
from texforce_hub.errors import DialectError, FileError

NO_NUMBERS = ["8", "", [8], {"a": 1}, True, None]


@damages("an alpha that is a word", DialectError, "lora_alpha .*expected a number", twin=write_peft_twin)
def _(path, rng):
    changes = {"lora_alpha": rng.choice(NO_NUMBERS)}
    write_config(path, rng.choice([changes, {"alpha_pattern": {"q_proj": rng.choice(NO_NUMBERS[:-1])}}]))


@damages("an alpha without end", DialectError, "alpha is (inf|-inf|nan|1e)", twin=write_peft_twin)
def _(path, rng):
    write_config(path, {"lora_alpha": rng.choice([10**400, float("nan"), float("inf"), -float("inf"), 1e60])})


@damages("a rank that is none", DialectError, "r, the rank, is", twin=write_peft_twin)
def _(path, rng):
    write_config(path, {"r": rng.choice([-4, -1, "4", [4], 2.5, True, {"r": 4}])})


@damages("a broken rank of a product", DialectError, "the rank of .* is", twin=write_peft_twin)
def _(path, rng):
    ranks = {"q_proj": rng.choice([0, -2, "8", 1.5]), "v_proj": 8}
    write_config(path, {"peft_type": rng.choice(["LOHA", "LOKR"]), "rank_pattern": ranks})


@damages("patterns that are none", DialectError, "expected an object of patterns", twin=write_peft_twin)
def _(path, rng):
    key = rng.choice(["rank_pattern", "alpha_pattern"])
    write_config(path, {key: rng.choice([[1], "q_proj", 7, True, ["q_proj", 4]])})


@damages("a pattern that is no expression", DialectError, "is no regular expression", twin=write_peft_twin)
def _(path, rng):
    key = rng.choice(["rank_pattern", "alpha_pattern"])
    write_config(path, {key: {rng.choice(["(", "[a", "*", "a{2,1}", "(?P<x", "\\", "(?<=a+)b"]): 4}})


@damages("a pattern that never ends", DialectError, "could take forever", twin=write_peft_twin)
def _(path, rng):
    endless = ["(.*a+)+!", "(x+x+)+y", "(.*)*!", ".*" * rng.randint(8, 99) + "!", "(a|aa|.)" * 40 + "!", "(.+){50}!"]
    write_config(path, {"alpha_pattern": {rng.choice(endless): 4}})


@damages("a broken config beside it", FileError, "is no JSON|no UTF-8 text|expected an object", twin=write_peft_twin)
def _(path, rng):
    (path.parent / "adapter_config.json").write_text(rng.choice(["", "{", "[1]", "\x00", '"r"', "[" * 99_999, "NaN"]))


@damages("a config that is no file", FileError, "folder|pipe|cannot be read", twin=write_peft_twin)
def _(path, rng):
    config = path.parent / "adapter_config.json"
    config.unlink()
    rng.choice([config.mkdir, lambda: os.mkfifo(config), lambda: config.symlink_to("nowhere")])()


@damages("a config of gigabytes", FileError, "more than 10000000 bytes", twin=write_peft_twin)
def _(path, rng):
    os.truncate(path.parent / "adapter_config.json", rng.randint(10**8, 10**10))  # a hole: it takes no room


@damages(
    "settings that are no settings", DialectError, "lora_adapter_metadata in the header", twin=write_diffusers_twin
)
def _(path, rng):
    text = rng.choice(["{", "[1]", "7", "\x1b[2J", "[" * 50_000, '{"a":' * 50_000, "null"])
    resave(path, loaded(path), {"lora_adapter_metadata": text})


@damages("settings in the wrong depth", DialectError, "holds 'text_encoder' as a", twin=write_diffusers_twin)
def _(path, rng):
    inner = rng.choice([{"lora_alpha": 8, "r": 4}, [8], "8", 8])
    resave(path, loaded(path), {"lora_adapter_metadata": json.dumps({"text_encoder": inner})})


@damages("settings whose alpha is a word", DialectError, "expected a number", twin=write_diffusers_twin)
def _(path, rng):
    text = json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": rng.choice(NO_NUMBERS)})
    resave(path, loaded(path), {"lora_adapter_metadata": text})
