"""MLflow's server with one additional page, for browsers that open its UI for the first time.

MLflow opens its pages for GenAI until the user switches to those for model training. The browser stores this choice for
each server; neither a page's address nor a tag of an experiment can set it permanently. This page stores the choice if
the browser has none, and redirects to the page of the UI given after ``#``.

``lrsa ui`` starts MLflow with this app, which pyproject.toml registers.
"""

from flask import Response
from mlflow.server import app as of_mlflow
from mlflow.server.fastapi_app import app as app

PATH = "/training"

_PAGE = """\
<!doctype html>
<meta charset="utf-8">
<title>MLflow</title>
<script>
  const choice = "mlflow.workflowType_v1";
  if (localStorage.getItem(choice) === null) localStorage.setItem(choice, JSON.stringify("machine_learning"));
  location.replace("/" + location.hash);
</script>
"""


@of_mlflow.route(PATH)
def training() -> Response:
    """Serve the page."""
    return Response(_PAGE, mimetype="text/html")
