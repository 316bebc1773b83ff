"""Faults on purpose: what is damaged, malicious, killed, crowded or out of space is named, or changes no result.

Each runs in a short form under pytest. The long forms print counts: ``python -m tests.faults.NAME`` for ``damage``,
``documents``, ``kill``, ``disk``, ``two_at_once`` and ``determinism``; docs/trust.md has those that were taken. Who
sees a flipped bit or a truncation:

===================================  =============================  ===================  ============================
fault                                ``dvc status``, ``dvc repro``  next use             ``drank audit`` of a model
===================================  =============================  ===================  ============================
a file was written                   seen; repro puts it back       refused, by name     seen, by name
a bit flipped, size and time as old  not seen                       refused, by name     seen, by name
an entry of DVC's cache, read-only   not seen; checked out as is    refused, by name;    seen, if it is asked for
                                                                    ``drank check``
a wheel                              not asked                      fetched again        not asked
dvc.lock                             seen, but for sizes of files   refused, or without  seen in the stages that made
                                                                    effect               the model
===================================  =============================  ===================  ============================

The next use is the stage that reads the file, or ``from_pretrained`` of a released folder.
"""
