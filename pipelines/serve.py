"""`loupe serve`: the flow as a Prefect deployment with a cron schedule, the Prefect UI beside it, on one machine.

The server of this command has the scheduler and the UI; it shares its database with the short-lived servers of `loupe run`, so their runs show up
in the UI as well.
"""

from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pipelines.errors import SettingError
from pipelines.flow_server import start_flow_server

__all__ = ["serve_recipe"]


def serve_recipe(recipe: str, root: str, settings: dict[str, str], *, cron: str, timezone: str, port: int) -> None:
    """Register the recipe's flow and run it on schedule until interrupted.

    Args:
        recipe: name or whole path.
        root: where everything durable lies.
        settings: execution settings by name.
        cron: five fields.
        timezone: IANA name.
        port: of the UI, on loopback.

    Raises:
        SettingError: the schedule cannot be read.
    """
    server = start_flow_server(ui=True, port=port)
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType
    from pydantic import ValidationError

    from pipelines.flow import loupe_flow
    from workers.storage import Store

    try:
        ZoneInfo(timezone)
        schedule = Cron(cron, timezone=timezone)
    except (ValueError, ValidationError, ZoneInfoNotFoundError) as error:
        raise SettingError(f"serve: found --cron {cron!r} --timezone {timezone!r}; allowed: five cron fields and an IANA time zone") from error
    server.wait_until_ready()
    print(f"Prefect UI: {server.url.removesuffix('/api')}   recipe: {recipe}   schedule: {cron} {timezone}   (Ctrl-C ends it)", flush=True)
    loupe_flow.serve(
        name=recipe.rpartition("/")[2].removesuffix(".toml"),
        schedules=[schedule],
        parameters={"recipe": recipe, "root": Store(root).root, "settings": settings},
        entrypoint_type=EntrypointType.MODULE_PATH,
        pause_on_shutdown=False,  # a restart must not leave the schedule paused
        limit=1,
        print_starting_message=False,
    )
