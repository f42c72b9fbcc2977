"""Evaluation: metrics, size and speed of models, and the report of a stage.

    quality.py    NLL over a whole held-out split, KL divergence and agreement of two models in one pass
    baselines.py  the same text by token frequencies, and by an untrained model
    intervals.py  95 % intervals over documents, paired ones, and those of interleaved timings
    size.py       weights, bytes on disk and in memory, layer by layer
    speed.py      prompt and decode rates of models that take turns
    figures.py    all of it as the blocks `before`, `after` and `change`
    verdict.py    the same in sentences
    report.py     report.json, report.md, report.html, plots/, tensorboard/ of one stage;  many.py: one page over many
    tables.py  charts.py  labels.py  formatting.py  events.py  templates/    how it is shown

What a stage calls:

    figures = evaluate_pair(Subject(before, "teacher", folder), Subject(after, "quantized", folder), blocks)
    write_report(directory, figures, records, About(title, "quantize", recipe=..., history=...))
"""
