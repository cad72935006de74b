"""What a report is made from – an evaluation, a drawing, a training run – and its page taken apart."""

import json
from html.parser import HTMLParser

from tests.support.evaluations import BASE, variant, write_evaluation
from texforce_hub import AdapterRef, DrawSettings
from texforce_hub.generate.recipe import DrawRun
from texforce_hub.generate.run import Drawing
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

VOID = {"meta", "img", "input", "br", "link", "wbr", "path", "rect", "line", "circle"}
PROMPTS = [
    "a lime disc",
    "a golden square",
    "a crimson wedge",
    "a cobalt block",
    "a lime wedge",
    "a golden disc",
    "a red disc",
    "a blue wedge",
]
LINE = {
    "stack": "shapes-colour",
    "axes": [{"label": "shapes-colour", "values": [0.0, 0.5, 1.0]}],
    "variants": ["base", "half", "colour"],
}


class Page(HTMLParser):
    """The tags of a page with their attributes, its texts, and that every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, **wanted):
        return [given for name, given in self.tags if name == tag and wanted.items() <= given.items()]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def write_few(path, *, swept=True, prompts=PROMPTS, **more):
    variants = [BASE, variant("colour", "colour", "shapes-colour"), variant("both", "both", "shapes-colour:2")]
    if swept:
        variants.append(variant("half", "half", "shapes-colour:0.5", sweep=0, position=[0.5]))
    path.mkdir(parents=True, exist_ok=True)
    return write_evaluation(path, variants=variants, prompts=prompts, sweeps=[LINE] if swept else [], **more)


def draw(folder, *sweeps, adapters=("shapes-colour",)):
    settings = DrawSettings(("a lime disc", "a golden square"), inference_steps=1, guidance=5.0)
    drawing = Drawing(DrawRun("shapes", tuple(map(AdapterRef.parse, adapters)), settings, sweeps=sweeps))
    drawing.load(device="cpu")
    drawing.draw(folder)
    return folder


def write_run(folder, lines=None, *, adapter=True, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines or [
        {"step": step, "reward": 0.3 + step / 100, "validation": 0.4 + step / 50 if step % 2 else None}
        for step in range(1, 8)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    (folder / "config.toml").write_text('base = "shapes"\nreward = ["alignment"]\nrank = 4\n')
    if adapter:
        write_adapter(read_adapter("shapes-colour"), folder / "pytorch_lora_weights.safetensors")
    return folder
