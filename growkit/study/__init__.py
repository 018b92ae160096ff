"""The study: several ways to spend one budget of training FLOPs, compared over seeds.

No torch at import: the training itself runs in worker processes.
"""
