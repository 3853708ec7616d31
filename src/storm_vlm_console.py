"""Entry of the `storm` command; its presence tells `storm_vlm` not to load the model code yet."""


def main() -> None:
    """Runs the command line."""
    from storm_vlm.cli.main import run  # noqa: PLC0415 (after this module is known to be loaded)

    run()
