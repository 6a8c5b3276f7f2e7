"""Where models come from: a folder, the hub, an MLflow registry; each becomes a checked local folder.

Nothing of a source is executed, and no code or pickle is even fetched. What comes out is a
:class:`SourceFolder`: files that are below the root that they may be below, compared with their manifests,
and remembered so well that a change between the check and the end of loading is noticed.

::

    names        the three forms of a source, read strictly
    folder       what is in a folder, and that it stays so
    manifest     SHA-256 digests: the catalogue's, and SHA256SUMS in the folder
    hub          one commit of a repository, by way of the hub's own cache
    registry     one version of a registered model, through registry_process (which runs mlflow_client),
                 judged by mlmodel, kept in content_cache
    resolve      all of it together
"""

from server.predict.sources.folder import CheckedFile, Identity, SourceFolder
from server.predict.sources.names import check_remote_source, source_kind
from server.predict.sources.resolve import Sources

__all__ = ["CheckedFile", "Identity", "SourceFolder", "Sources", "check_remote_source", "source_kind"]
