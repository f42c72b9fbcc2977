"""Sequence classification: the class of a text or of a pair of texts (BERT, arXiv 1810.04805, section 4.1).

B rows, T tokens a row, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from app.data.columns import RowColumns
from app.data.corpus import Corpus
from app.data.labelled import LabelledBlocks, encode_row
from app.data.sources import open_source
from app.data.tokenizer import Tokenizer
from app.evaluation.baselines import frequencies
from app.evaluation.metrics import METRICS, Accuracy, Loss, MacroF1, MatthewsCorrelation, Metric
from app.evaluation.rows import IGNORED
from app.evaluation.speed import ForwardProtocol
from app.tasks.base import TASKS, Batch, Forward
from app.tasks.tokens import TokenTask
from models.config import ModelConfig
from models.errors import UserError
from models.heads.classifier import Classifier
from models.registry import Names, Several
from models.transformer import Transformer

if TYPE_CHECKING:
    from app.data.labelled_module import LabelledData  # imports Lightning, which takes seconds

FIGURES = (Accuracy(), MacroF1(), MatthewsCorrelation(), Loss(per="row"))
UNKNOWN = 2  # classes of an architecture that is checked before the data is read


@TASKS.register("classify")
@dataclass(frozen=True)
class Classify(TokenTask):
    """Sequence classification, for an encoder or a decoder.

    Args:
        text: columns with the text or the pair; those of the data.
        label: column with the class; that of the data.
        labels: the classes in their order; by default those of the training split.
        sequence_length: tokens that a row may have; that of the data.
        metrics: what a model is measured by; the first is the one that verdicts are about.
    """

    text: tuple[str, ...] = field(default=(), metadata={"registry": Names()})
    label: str = ""
    labels: tuple[str, ...] = field(default=(), metadata={"registry": Names()})
    sequence_length: int | None = None
    metrics: tuple[Metric, ...] = field(default=FIGURES, metadata={"registry": Several(METRICS)})

    one_a_row = True
    describes, predicts, predicted, per = "classifier", "class", "class", "row"
    positions, model, floor = "rows", "classifier", "majority"
    pipeline = "text-classification"
    protocol = ForwardProtocol
    normalisation = "per row; a class is predicted once for each"
    default_source = None

    def shaped(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """The architecture with a classifier for its head, of as many outputs as there are classes."""
        head = architecture.get("head")
        given = dict(head) if isinstance(head, Mapping) and head.get("kind") == Classifier.kind else {}
        pool = "last" if architecture.get("direction", "causal") == "causal" else "mean"
        head = {"kind": Classifier.kind, "pool": pool, "classes": UNKNOWN, **given}
        return {**architecture, "head": head | ({"classes": len(self.labels)} if self.labels else {})}

    def check(self, config: ModelConfig) -> None:
        if not isinstance(config.head, Classifier):
            raise UserError(f"the head is {config.head.kind}, and classify needs a classifier")
        if config.direction == "causal" and config.head.pool == "first":
            raise UserError(
                "the architecture is causal, and its first token has seen no other; give head: {kind: classifier, "
                "pool: last}"
            )
        if self.labels and len(self.labels) != config.outputs:
            raise UserError(f"the head has {config.outputs} classes, and the task {len(self.labels)} labels")

    def data_class(self) -> type:
        from app.data.labelled_module import LabelledData  # imports Lightning, which takes seconds

        return LabelledData

    def data(self, column: str | None = None, **options: Any) -> "LabelledData":
        """The data module with these options, and with the columns that the task knows."""
        known = {"text": list(self.text), "label": self.label} if self.text else {}
        return super().data(**{**known, **options})

    def with_data(self, data: "LabelledData") -> Self:
        columns = data.columns
        return replace(
            self,
            text=columns.texts,
            label=columns.label,
            labels=data.classes,
            sequence_length=data.sequence_length,
        )

    def corpus(self, source: str, column: str | None = None) -> Corpus:
        if column is not None:
            raise UserError(
                f"a classifier reads the columns that it was trained on ({', '.join((*self.text, self.label))}); leave "
                "--column out"
            )
        if not self.text:
            raise UserError(
                "the classifier does not know the columns of its data; import its folder with --task '{kind: classify, "
                "text: sentence, label: label}'"
            )
        return open_source(source, RowColumns(self.text, self.label))

    def blocks(
        self, corpus: Corpus, tokenizer: Tokenizer, split: str, length: int, samples: int | None, seed: int
    ) -> LabelledBlocks:
        rows = LabelledBlocks(corpus, tokenizer, split, self.labels, length)
        if samples is None:
            return rows
        draw = np.random.Generator(np.random.PCG64(seed))
        return rows.choose(np.sort(draw.permutation(len(rows))[:samples]))

    def predicted_rows(self, model: Forward, batch: Batch) -> list[dict[str, Any]]:
        """Number of each row in its source, its likeliest class, and the probability of that."""
        real = batch["targets"] != IGNORED  # (B, T), one in each row that is no padding
        shares, best = self.predictions(model, batch).exp().max(-1)  # (N,)
        rows = zip(batch["ids"][real.any(1), 0].tolist(), best.tolist(), shares.tolist(), strict=True)
        return [{"row": row, "label": self.labels[number], "probability": share} for row, number, share in rows]

    def baselines(self, config: ModelConfig, blocks: Sequence[Batch], training: Any = None, **options: Any) -> dict:
        """Majority class: every row by the frequencies of the classes, so that the most frequent is always chosen."""
        return {"majority": frequencies(config, blocks, training, self.metrics, "class")}

    def samples(self, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any) -> list[str]:
        """Each prompt (a pair with a tab between) with its likeliest class and the probability of that."""
        texts = []
        for prompt in prompts:
            ids = encode_row(prompt.split("\t"), tokenizer, self.sequence_length or model.config.context)
            tokens = torch.tensor([ids], device=next(model.parameters()).device)
            share, best = model(tokens).logits[0, -1].float().softmax(-1).max(-1)
            texts.append(f"{prompt}\n-> {self.labels[int(best)]} ({float(share):.0%})")
        return texts
