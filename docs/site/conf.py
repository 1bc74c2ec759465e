"""The site: the notebooks and pages as they are, with the outputs as committed.

pip install -r docs/site/requirements.txt && sphinx-build -c docs/site . runs/site
"""

import os
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

GITHUB = "https://github.com/" + os.environ.get("GITHUB_REPOSITORY", "OWNER/REPO")
ROOT = Path(__file__).parents[2]

project = html_title = "RLHF from scratch, in notebooks"
author = "The RLHF from scratch authors"
extensions = ["myst_nb", "sphinx_external_toc"]
include_patterns = ["*.md", "*.ipynb", "more/*.ipynb", "docs/*.md", "docs/real-run/*"]
include_patterns += ["exercises/*.md", "exercises/*.ipynb", "exercises/release/*/*"]
external_toc_path = "docs/site/toc.yml"
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3  # named as GitHub names them
smartquotes = False
html_theme = "sphinx_book_theme"
html_theme_options = {
    "repository_url": GITHUB,
    "repository_branch": "main",
    "use_repository_button": True,
    "navbar_persistent": [],  # the second field for searching
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
}


class OnGitHub(SphinxPostTransform):
    """A link to a file or folder that is no page leads to it on GitHub."""

    default_priority = 8  # before the links are resolved that lead to pages

    def run(self, **_):
        """Replace the nodes of such links."""
        links = (addnodes.pending_xref, addnodes.download_reference)
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for node in [x for kind in links for x in self.document.findall(kind)]:
            path = (folder / node["reftarget"].lstrip("/")).resolve()
            if path.exists() and path.suffix not in (".md", ".ipynb"):
                url = f"{GITHUB}/blob/main/{path.relative_to(ROOT).as_posix()}"
                link = nodes.reference("", "", *node.children, refuri=url)
                node.replace_self(link)


def setup(app):
    """Sphinx calls this."""
    app.add_post_transform(OnGitHub)
