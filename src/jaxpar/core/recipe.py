"""A Recipe: every choice of one run, as plain values; equal recipes give equal runs."""

import dataclasses
import json
from dataclasses import dataclass, field

from jaxpar.core import strict
from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Collector, refuse


@dataclass(frozen=True)
class Model:
    """Which model, and its sizes; a field that the model does not have must stay None.

    Attributes:
        name: a member of models/, or path/to/file.py:name.
        layers: blocks.
        width: features of the residual stream.
        hidden: features inside a block; by default the model's own.
        heads: attention heads.
        kv_heads: key and value heads, a divisor of heads; by default as many.
        context: longest sequence, in tokens.
        vocab: tokens or classes; by default what the data has.
        dropout: share of entries zeroed in training.
        norm: a member of norms/, with arguments of its own such as group:groups=8; in the cells of an rnn, lstm or gru.
        activation: gelu (exact), gelu_tanh, relu or tanh.
        bias: whether projections and norms have a bias.
        tied: whether the head is the token table.
    """

    name: str = "gpt"
    layers: int | None = None
    width: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    context: int | None = None
    vocab: int | None = None
    dropout: float | None = None
    norm: str | None = None
    activation: str | None = None
    bias: bool | None = None
    tied: bool | None = None


@dataclass(frozen=True)
class Data:
    """Which data.

    Attributes:
        name: a member of datasets/, or path/to/file.py:name; with arguments of its own such as cifar10:augment=false.
    """

    name: str = "stdlib_text"


@dataclass(frozen=True)
class Recipe:
    """Every choice of one run.

    Attributes:
        model: which model.
        data: which data.
        plan: how a step is spread over devices, such as data=2,tensor=two_d:2x2.
        batch: examples per step, over all devices.
        steps: updates in the whole run.
        seed: of parameters, data order and dropout.
        optimizer: a member of optimizers/, with arguments of its own such as sgd:momentum=0.95+nesterov=true.
        learning_rate: largest rate, reached after the warm-up.
        schedule: of the rate after the warm-up: cosine or linear, down to a tenth of it; cosine:SHARE or linear:SHARE;
            constant; steps:0.4=0.1+0.6=0.01, a tenth of it from 0.4 of all steps on, a hundredth from 0.6 on.
        warmup: steps of linear warm-up; by default a tenth of all steps, at most 100.
        weight_decay: decoupled decay of matrices, per unit of learning rate.
        clip: largest global norm of the gradients; 0 for no limit.
        evaluate_every: steps between evaluations on held-out data; 0 for the end only.
        evaluate_batches: held-out batches per evaluation, at most.
        checkpoint_every: steps between checkpoints; 0 for the end only.
        skip_limit: updates skipped in a row, since loss or gradients were no numbers, after which the run stops; not
            counted are those after which a smaller loss scale may mend it.
        loss_scale: what gradients are multiplied by on their way back: none, static:1000, dynamic, enhanced, or with
            numbers of your own dynamic:65536+interval=2000, enhanced:40000=8192; auto: as the precision asks.
        master: format in which parameters rest between steps: fp32, fp16, bf16, fp169 ..., fixed:4.12; none: that of
            products; auto: as the precision asks. Steps compute with float32 copies.
        rounding: of updates onto such a format: nearest or stochastic; auto: stochastic.
        peak_tflops: 1e12 flops per second of one device, for MFU; by default those of the chip in bfloat16, if known.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    plan: Plan = field(default_factory=Plan)
    batch: int = 32
    steps: int = 200
    seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 100
    evaluate_batches: int = 8
    checkpoint_every: int = 100
    skip_limit: int = 5
    loss_scale: str = "auto"
    master: str = "auto"
    rounding: str = "auto"
    peak_tflops: float | None = None

    def to_json(self) -> str:
        """All fields as JSON, the plan as its string; `Recipe.from_json` reads it back."""
        values = dataclasses.asdict(self) | {"plan": str(self.plan)}
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe that `to_json` wrote, or one by hand: fields that are left out keep their defaults.

        Raises:
            Refused: naming every key that is unknown or given twice, and every value of the wrong type.
        """
        found = Collector([])
        values = strict.parsed(text, "recipe", found.problems)
        found.problems.extend(strict.unknown(values, cls))
        fields = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        for name, kind in {"model": Model, "data": Data}.items():
            if isinstance(inner := fields.get(name), dict):
                found.problems.extend(strict.unknown(inner, kind, f"{name}."))
                fields[name] = kind(**{key: inner[key] for key in inner if key in kind.__dataclass_fields__})
        if isinstance(plan := fields.get("plan"), str):
            fields["plan"] = found.attempt(Plan.parse, plan) or Plan()
        recipe = cls(**fields)
        refuse([*found.problems, *strict.mistyped(recipe)])
        return recipe
