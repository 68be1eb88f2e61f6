"""The static site: every artefact, run and model on pages that need no server and no network."""

from rodimus_lab.site.build import build_site, site_root

__all__ = ["build_site", "site_root"]
