"""Sequential calibration: block by block, on the outputs of the compressed blocks before it.

The driver belongs to no method. It runs the calibration tokens through a block, gathers the statistics that the method
asks for at the inputs of the block's linear layers, lets the method change the block, and computes the inputs of the
next block with the changed one. Beside the model it holds the activations of the calibration tokens once, and the
statistics of one block. Embedding and head are the last step; the head's input is the output of the final norm.

    class Method(LayerMethod):                              # a method is one class
        def statistic(self, name, module): return Hessian   # what to gather at which input, or None
        def compress(self, name, module, statistic): ...    # -> (module that takes its place or None, LayerRecord)

    records = calibrate_sequentially(model, Method(), batches, store=FolderStore(folder), progress=print)

B batch, T tokens of a row, D model width, N tokens, K input channels of a linear layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.calibration.experts import ExpertCounts, load_of, router_maps
from compress.calibration.observer import Enough, Observer
from compress.calibration.records import LayerRecord
from compress.calibration.statistics import Statistic, StatisticType
from compress.calibration.store import Store
from models.attention.protocol import ForwardInputs
from models.backbone import Hidden
from models.errors import UserError
from models.weight_formats import described, install

Batch = dict[str, Tensor]  # `tokens` (B, T) int64 and, where rows hold several documents, `documents` (B, T)


class Progress(NamedTuple):
    """One finished step: block `index` of `count` (the last is embedding and head), and one of its layers."""

    index: int
    count: int
    layer: str
    error: float | None
    seconds: float


@dataclass
class BlockStep:
    """A block under calibration, or, as the last step, the embedding and head.

    Attributes:
        index: 0 for the first block; the number of blocks for embedding and head.
        model: the whole model; set a module by its full name with `replace`.
        prefixes: the modules that make up this step, by their full names, e.g. `("blocks.3",)`.
        linears: full name -> `nn.Linear` or `nn.Embedding` in this step, in the order of the model.
        statistics: full name -> what was gathered at that module's input; maps that read one input share it.
        inputs: hidden states (B, T, D) that enter the step, one tensor a batch; empty when nothing asked for data.
        contexts: what `Transformer.embed` gave beside each of them: `module(inputs[i], contexts[i])` runs a block.
        load: which experts of the block the calibration tokens went to; None where it has none, or no data was run.
        methods: full name -> the method chosen for it, where several share the step and one is handed all of it.
        extras: tensors, by name, that the method wants kept with this step; there again in `restore_block`.
    """

    index: int
    model: nn.Module
    prefixes: tuple[str, ...]
    linears: dict[str, nn.Module]
    statistics: dict[str, Statistic] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)
    load: ExpertCounts | None = None
    methods: Mapping[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    report: Callable[[LayerRecord], None] = lambda record: None

    @property
    def module(self) -> nn.Module:
        """The block, or the whole model for the last step."""
        return self.model.get_submodule(self.prefixes[0]) if len(self.prefixes) == 1 else self.model

    def run(self, x: Tensor, inputs: ForwardInputs) -> Hidden:
        """Run the block on the residual stream x (B, T, D)."""
        return self.model.run(x, inputs, blocks=slice(self.index, self.index + 1))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the module called `name` (full name)."""
        self.model.set_submodule(name, module, strict=True)

    def state(self) -> dict[str, Tensor]:
        """The tensors of this step under their names in the model's state dict."""
        return {
            f"{prefix}.{name}": tensor
            for prefix in self.prefixes
            for name, tensor in self.model.get_submodule(prefix).state_dict().items()
        }

    def forms(self) -> dict[str, dict[str, Any]]:
        """The stored forms in this step: module name -> spec."""
        return {
            f"{prefix}.{name}" if name else prefix: spec
            for prefix in self.prefixes
            for name, spec in described(self.model.get_submodule(prefix)).items()
        }


class Method(ABC):
    """A compression method, as the driver calls it; by default it accepts every model and needs no data."""

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None) -> None:  # noqa: B027 (a hook)
        """Look at the whole model before the first block; raise UserError for what cannot work."""

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        """Statistic of the inputs of this linear layer, or None; the same answer whenever it is asked."""
        return None

    @abstractmethod
    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        """Change the step in place: one record for every one of `step.linears`; call `step.report` with each."""

    def restore_block(self, step: BlockStep, state: dict[str, Tensor], forms: dict[str, dict[str, Any]]) -> None:
        """Bring a step into the state in which `compress_block` left it in an earlier run.

        Args:
            state: the saved tensors, for dense modules of the shapes that they had when saved.
            forms: the stored forms, which are installed first.
        """
        device = next(step.model.parameters()).device
        with torch.device("meta"):
            install(step.model, forms)
        for prefix in step.prefixes:
            own = {name[len(prefix) + 1 :]: t.to(device) for name, t in state.items() if name.startswith(prefix + ".")}
            step.model.get_submodule(prefix).load_state_dict(own, assign=True)


class LayerMethod(Method):
    """A method that treats every linear layer by itself."""

    @abstractmethod
    def compress(
        self, name: str, module: nn.Module, statistic: Statistic | None
    ) -> tuple[nn.Module | None, LayerRecord]:
        """Compress one linear layer or embedding.

        Returns the module that takes its place, or None when `module` was changed in place or left alone, and the
        record, `skipped` with its reason when it was left alone.
        """

    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        """`compress` every linear layer of the step in turn."""
        records = []
        for name, module in step.linears.items():
            new, record = self.compress(name, module, step.statistics.get(name))
            if new is not None:
                step.replace(name, new)
            records.append(record)
            step.report(record)
        return records


def steps_of(model: nn.Module) -> list[BlockStep]:
    """The blocks of a `Transformer` in their order, then embedding and head; routers are no part of any."""
    steps = []
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        apart = router_maps(block)
        maps = {child: m for child, m in block.named_modules() if isinstance(m, nn.Linear) and child not in apart}
        linears = {f"{name}.{child}": m for child, m in maps.items()}
        steps.append(BlockStep(index, model, (name,), linears))
    ends = {name: getattr(model, name) for name in ("embedding", "head")}
    present = tuple(name for name, module in ends.items() if module is not None)
    linears = {name: ends[name] for name in present if isinstance(ends[name], nn.Linear | nn.Embedding)}
    steps.append(BlockStep(len(steps), model, (*present, "norm"), linears))
    return steps


class Activations:
    """The hidden states of the calibration tokens at one place in the model, moved forward block by block."""

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self.device, self.autocast = device, autocast
        self.inputs: list[Tensor] = []  # (B, T, D) each
        self.contexts: list[Any] = []
        self.valid: list[Tensor | None] = []  # (B, T) bool: not padding; None where there is none
        for batch in batches:
            documents = batch.get("documents")
            x, context = model.embed(batch["tokens"], documents=documents)
            padded = documents is not None and bool((documents < 0).any())
            self.inputs.append(x)
            self.contexts.append(context)
            self.valid.append(documents >= 0 if padded else None)
        if not self.inputs:
            raise UserError("the calibration data holds no batch; give text that fills at least one sequence")

    def tensors(self) -> dict[str, Tensor]:
        """The hidden states, and what the layers so far have left to later ones, by batch."""
        found = {str(i): x for i, x in enumerate(self.inputs)}
        for i, context in enumerate(self.contexts):
            found |= {f"{i}:{layer}:{name}": tensor for (layer, name), tensor in context.state.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""
        states: list[dict[tuple[int, str], Tensor]] = [{} for _ in self.inputs]
        for key, tensor in tensors.items():
            i, *rest = key.split(":", 2)
            tensor = tensor.to(self.inputs[int(i)].device)
            if rest:
                states[int(i)][int(rest[0]), rest[1]] = tensor
            else:
                self.inputs[int(i)] = tensor
        self.contexts = [one._replace(state=state) for one, state in zip(self.contexts, states, strict=True)]

    def casting(self) -> AbstractContextManager:
        """Autocast of the forward passes, where a dtype was given."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def run(self, run: Callable[[Tensor, ForwardInputs], Hidden], keep: bool, begin: Callable[[int], None]) -> None:
        """Pass every batch through blocks; with `keep` their outputs become the inputs of what follows."""
        for i, (x, context) in enumerate(zip(self.inputs, self.contexts, strict=True)):
            begin(i)
            with self.casting(), suppress(Enough):
                hidden = run(moved(x, self.device), moved(context, self.device))  # (B, T, D)
            if keep:
                self.inputs[i] = hidden.x.to(x)
                self.contexts[i] = context._replace(state=moved(hidden.inputs.state, x.device))


def moved(value: Any, device: torch.device) -> Any:
    """Tensors inside (named) tuples and dictionaries on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        items = tuple(moved(item, device) for item in value)
        return items if type(value) is tuple else type(value)(*items)
    return value


def _wanted(method: Method, step: BlockStep) -> dict[str, StatisticType]:
    """Layer name -> statistic. An embedding reads token ids: only as a tied head has it an input to gather at."""
    kinds = {}
    for name, module in step.linears.items():
        if isinstance(module, nn.Linear) or step.model.head is None:
            kinds[name] = method.statistic(name, module)
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _pass(step: BlockStep, observer: Observer, activations: Activations) -> None:
    """Take every batch through a block; experts that were given too few tokens take more."""
    load = step.load
    with observer.watching(step.linears), load.counting(observer.real) if load else nullcontext():
        activations.run(step.run, keep=False, begin=lambda i: observer.begin(activations.valid[i]))
    if load is None:
        return
    further = load.further(lambda begin: activations.run(step.run, keep=False, begin=begin))
    with observer.watching(step.linears), activations.casting():
        for expert, x in further.items():  # x (n, D)
            observer.begin(None)
            with suppress(Enough):
                load.experts[expert](x)


def _gather(step: BlockStep, kinds: dict[str, StatisticType], activations: Activations) -> None:
    last = step.module is step.model
    observer = Observer(kinds, activations.device, None if last else step.module.depth)
    step.inputs, step.contexts = activations.inputs, activations.contexts
    if last:

        def observe(x: Tensor, inputs: ForwardInputs) -> None:
            hidden = step.model.read(x, inputs.documents)  # (B, T, D)
            for name in kinds:
                observer.take(name, hidden)

        activations.run(observe, keep=False, begin=lambda i: observer.begin(activations.valid[i]))
    else:
        _pass(step, observer, activations)
    step.statistics = observer.statistics
    for name, statistic in step.statistics.items():
        if not statistic.finite():
            raise UserError(
                f"the inputs of {name} hold NaN or infinity on the calibration text: "
                "the weights before it, or its own block's, are broken; nothing can be calibrated on them"
            )


@torch.no_grad()
def calibrate_sequentially(
    model: nn.Module,
    method: Method,
    batches: Sequence[Batch] | None = None,
    *,
    store: Store | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    minimum_tokens: int | None = None,
) -> list[LayerRecord]:
    """Take `method` through every block of a `Transformer`, then embedding and head; the model changes in place.

    Args:
        model: a `Transformer`; left in evaluation mode, as dropout must be off while it is looked at.
        method: what to gather and what to do.
        batches: calibration tokens; may be None for a method that asks for no statistic.
        store: where finished steps are kept. With a store that an interrupted run of the same settings has left, the
            finished steps are restored and the end result is the same to the bit.
        progress: called after every layer.
        device: where blocks run, one at a time; by default where the model is. The rest stays where it is.
        autocast: dtype in which the calibration forward passes compute their matrix products; by default the model's.
        minimum_tokens: tokens that every expert is calibrated on (compress/calibration/experts.py); 0: those that its
            router gives it.

    Raises:
        UserError: no calibration data where the method needs some; NaN or infinity at a named layer's input.
    """
    model.eval()
    method.prepare(model, batches)
    steps = steps_of(model)
    kinds = [_wanted(method, step) for step in steps]
    last = max((i for i, kind in enumerate(kinds) if kind), default=-1)  # the last step that needs to see data
    if last >= 0 and batches is None:
        raise UserError("this method calibrates: give it text (data, samples, sequence_length)")
    home = next(model.parameters()).device
    activations = Activations(model, batches, torch.device(device or home), autocast) if last >= 0 else None
    done, records = _resume(steps, method, store, activations, last)
    for step, kind in zip(steps[done:], kinds[done:], strict=True):
        _announce(step, len(steps), progress)
        blocklike = step.module is not model
        step.module.to(activations.device if activations and blocklike else home)
        if kind:
            step.load = load_of(step.module, step.prefixes[0], kind, minimum_tokens) if blocklike else None
            _gather(step, kind, activations)
        new = method.compress_block(step)
        new = step.load.noted(new) if step.load else new
        if step.index < last:
            activations.run(step.run, keep=True, begin=lambda i: None)
        step.module.to(home)
        records += new
        _keep(step, new, store, activations, last)
        step.statistics, step.inputs, step.contexts, step.load = {}, [], [], None
    return records


def _announce(step: BlockStep, count: int, progress: Callable[[Progress], None] | None) -> None:
    if progress is not None:
        step.report = lambda record: progress(Progress(step.index, count, record.name, record.error, record.seconds))


def _keep(
    step: BlockStep, records: list[LayerRecord], store: Store | None, activations: Activations | None, last: int
) -> None:
    """The activations first: a step counts as done when its own entry is there."""
    if store is None:
        return
    if step.index < last:
        store.save(f"chain-{step.index}", activations.tensors(), {})
    tensors = {f"state:{name}": tensor for name, tensor in step.state().items()}
    tensors |= {f"extra:{name}": tensor for name, tensor in step.extras.items()}
    info = {"forms": step.forms(), "records": [record.to_dict() for record in records]}
    store.save(f"part-{step.index}", tensors, info)
    store.remove(f"chain-{step.index - 1}")


def _resume(
    steps: list[BlockStep], method: Method, store: Store | None, activations: Activations | None, last: int
) -> tuple[int, list[LayerRecord]]:
    """Restore the finished steps; returns how many there are, with their records."""
    saved = []
    for step in steps if store is not None else []:
        entry = store.load(f"part-{step.index}")
        if entry is None:
            break
        saved.append(entry)
    while 0 < len(saved) <= last:
        held = store.load(f"chain-{len(saved) - 1}")
        if held is not None:
            activations.restore(held[0])
            break
        saved.pop()
    records = []
    for step, (tensors, info) in zip(steps, saved, strict=False):
        step.extras = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("extra:")}
        state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state:")}
        method.restore_block(step, state, info["forms"])
        records += [LayerRecord.from_dict(record) for record in info["records"]]
    return len(saved), records
