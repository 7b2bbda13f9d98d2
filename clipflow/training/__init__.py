"""Training: recipes, an exactly resumable loop, and the stages that make the scenes model.

`run.train` runs one recipe, `run.train_scenes` all of them; `loop.fit` trains any module.
"""
