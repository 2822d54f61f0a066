"""MLflow's server with one more page, for browsers that have never shown its UI.

MLflow opens in its pages for GenAI until somebody switches it to those for training; its links forget what the address
of a page says about it, and no tag of an experiment decides it. The browser keeps the choice for each server. So this
page makes the choice in a browser that has none, and leads to the page of the UI that follows ``#``.

``lrsa ui`` has MLflow run it, as the app that pyproject.toml registers.
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
    """The page, which is the same for all."""
    return Response(_PAGE, mimetype="text/html")
