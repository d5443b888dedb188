"""The workshop: what measures and proves. It is not installed; run it from the repository."""
