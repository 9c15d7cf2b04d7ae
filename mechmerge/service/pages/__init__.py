"""The web page: what a team sees of its runs in a browser, server-rendered, with a little JavaScript.

    /                          runs and queue, live                       jobs.py, live.py
    /new                       start a run                                submit.py
    /runs/ID                   a run: state, stages, log, files           jobs.py
    /runs/ID/maps              where the behaviours lie                   results.py, components.py
    /runs/ID/recipes           what each recipe takes                     results.py
    /runs/ID/builder           another recipe, and what it would do       builder.py
    /runs/ID/evaluation        models compared, with intervals            results.py
    /runs/ID/samples           answers side by side, with verdicts        samples.py
    /runs/ID/gate              the gate of every merge, and publishing    gate.py
    /login  /logout            sessions                                   sessions.py
    /static/…                  style and script                           assets.py

Everything works without JavaScript: forms post, links lead on, and what is live is as new as the last reload. Numbers come from
where the command line and the report have them, `recipe`, `evaluate` and `report`: nothing is computed anew by a script.
"""

from __future__ import annotations

from fastapi import APIRouter

from mechmerge.service.pages import assets, builder, components, gate, jobs, live, results, samples, sessions, submit

router = APIRouter(include_in_schema=False)
for _part in (assets, sessions, live, jobs, submit, results, components, builder, samples, gate):
    router.include_router(_part.router)
