"""Training: recipes, the loop, checkpoints, logs and the report.

==============  ========================================================================================================
``recipe``      dataclasses that define a run; YAML in, YAML out (``schema`` builds them and refuses what does not fit)
``loop``        `train(recipe)`: the loop itself, in reading order
``setup``       data, model and precision from a recipe
``optimizer``   AdamW with decay groups, learning-rate schedules as pure functions of the step
``guard``       stops at the first loss or gradient that is not a number
``checkpoint``  state on disk, complete or absent, from which a run continues to the same digits
``run``         the run directory: which recipe it belongs to, whether to resume, the model directory it becomes
``interrupt``   Ctrl-C finishes the step
``logs``        metrics.jsonl, TensorBoard, the console
``report``      a finished or running directory as one HTML file
``parallel``    the processes of a run
==============  ========================================================================================================

Importing this package imports neither torch nor transformers; its modules do when they are used.

Example:
    >>> from farspan.training.loop import train
    >>> from farspan.training.recipe import load_recipe
    >>> train(load_recipe("recipes/demo.yaml"))  # doctest: +SKIP
"""
