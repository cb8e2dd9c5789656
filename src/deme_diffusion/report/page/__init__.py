"""The page of a run: one self-contained HTML file, no scripts, nothing fetched, every text escaped."""

from deme_diffusion.report.album import Album, Image, data_uri
from deme_diffusion.report.page.environment import environment
from deme_diffusion.report.page.render import render_page, write_page

__all__ = ["Album", "Image", "data_uri", "environment", "render_page", "write_page"]
