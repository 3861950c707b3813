"""Built-in tasks: data and models that need no network."""
