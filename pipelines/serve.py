"""`loupe serve`: the flow as a Prefect deployment with a cron schedule, the Prefect UI beside it, on one machine.

The server of this command has the scheduler and the UI; it shares its database with the short-lived servers of `loupe run`, so their runs show up
in the UI as well.
"""

import difflib
import os
import socket
from zoneinfo import available_timezones

from pipelines.errors import SettingError
from pipelines.flow_server import start_flow_server

__all__ = ["check_schedule", "serve_recipe"]


def check_schedule(cron: str, timezone: str, port: int) -> None:
    """Check what a schedule is made of before anything starts.

    Args:
        cron: five fields: minute, hour, day of the month, month, weekday.
        timezone: IANA name.
        port: that the UI will listen on; of no matter where PREFECT_API_URL names a server.

    Raises:
        SettingError: one of them cannot be; the message says what is allowed.
    """
    if len(cron.split()) != 5:
        raise _bad_cron(cron)
    if timezone not in available_timezones():
        match = difflib.get_close_matches(timezone, available_timezones(), n=1)
        hint = f"did you mean {match[0]!r}? " if match else ""
        raise SettingError(f"serve --timezone: found {timezone!r}; {hint}allowed: an IANA time zone such as 'UTC' or 'Europe/Berlin'")
    if not 1 <= port <= 65535:
        raise SettingError(f"serve --port: found {port}; allowed: 1 to 65535")
    if "PREFECT_API_URL" in os.environ:
        return  # the user's own server: none of ours will listen
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingError(f"serve --port: found {port}, which cannot be listened on ({error.strerror}); allowed: a free port") from error


def _bad_cron(cron: str) -> SettingError:
    return SettingError(f"serve --cron: found {cron!r}; allowed: five fields, minute hour day month weekday, such as '0 3 * * *'")


def serve_recipe(recipe: str, root: str, settings: dict[str, str], *, cron: str, timezone: str, port: int) -> None:
    """Register the recipe's flow and run it on schedule until interrupted.

    Args:
        recipe: name or whole path.
        root: where everything durable lies.
        settings: execution settings by name.
        cron: five fields; see `check_schedule`.
        timezone: IANA name.
        port: of the UI, on loopback.

    Raises:
        SettingError: a field of the schedule cannot be read.
    """
    # A scheduled run that fails says so in this terminal too; `loupe run` prints its own errors.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR")
    server = start_flow_server(ui=True, port=port)
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from pipelines.flow import loupe_flow
    from workers.storage import Store

    try:
        schedule = Cron(cron, timezone=timezone)
    except ValueError as error:
        raise _bad_cron(cron) from error
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
