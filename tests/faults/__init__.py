"""Faults on purpose: what is damaged, degenerate or malicious is named, or changes no result.

Each runs in a short form under pytest; ``damage`` and ``documents`` have a long form that prints counts, as in
``python -m tests.faults.damage --n 1000``. Who sees a flipped bit or a truncation:

=====================================  ===============================  ========================================
fault                                  ``dvc status``, ``dvc repro``    ``drank audit`` of a model made before
=====================================  ===============================  ========================================
a file was written                     seen; repro puts it back         seen, by name
a bit flipped, size and time are old   not seen                         seen, by name
an entry of DVC's cache, read-only     not seen, and checked out as is  seen, by name
dvc.lock                               seen, but for sizes of files     seen in the stages that made the model
=====================================  ===============================  ========================================

A stage, or ``from_pretrained``, that is run by itself sees what no longer parses or has another shape. It does not see
a flipped bit among the numbers: safetensors has no checksum.
"""
