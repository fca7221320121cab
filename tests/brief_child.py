"""A child of `engines.child.ChildServer` that is ready and gone."""

print("READY", flush=True)
