"""The live page: watch runs train, look at them as trees, branch them by hand, replay them, and compare them.

panel serve dashboards/live.py --address 127.0.0.1 --port 5006 --args runs

It reads journals and sends commands into them; it never trains. Without `--address 127.0.0.1` Panel listens on
every interface: then the buttons work only behind a login, and the page says so:

panel serve dashboards/live.py --address HOST --basic-auth PASSWORD --cookie-secret ANY_LONG_SECRET
    --basic-login-template dashboards/login.html --allow-websocket-origin HOST:5006 --args runs
"""
import panel as pn

from sdalab.views.page import serve

if pn.state.served: serve()
