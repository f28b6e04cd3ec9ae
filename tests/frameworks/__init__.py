"""Training frameworks that use onepass instead of torch.optim, on a CPU.

``make test-frameworks`` runs these tests in a separate environment, because the frameworks are
large and require other versions of packages. ``make test`` does not run them.
"""
