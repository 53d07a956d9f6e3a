"""What a form may ask of the selected places."""

from __future__ import annotations

from veneer.core.site import Site
from veneer.errors import UserError


def require_whole(site: Site, sites: list[Site], who: str) -> None:
    """Refuse a selection of only some roles of a fused projection, for a form that changes whole tensors."""
    if site.rows is None:
        return
    taken = sum(s.rows.stop - s.rows.start for s in sites if s.module is site.module)
    rows = site.module.weight.shape[1 if site.transposed else 0]
    if taken < rows:
        raise UserError(
            f"{who}: {site.module_path} fuses several projections in one tensor and only {taken} of its {rows} rows "
            f"are selected; select all of it with sites={site.module_path.rpartition('.')[2]!r}"
        )
