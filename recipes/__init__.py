"""One experiment a file. `deitfast.recipes` is a link to this folder."""
