"""Published names and settings of LongViT and of the slide encoder of Prov-GigaPath."""

from farspan.models.convert.families import Family

FAMILIES: tuple[Family, ...] = ()
