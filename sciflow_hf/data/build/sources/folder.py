"""A folder of image files, with captions in metadata files or in texts of the images' names."""

import mimetypes
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ....errors import SciflowError, first_line
from ...row_filter import LEFT_OUT, RowFilter
from ..tally import Tally
from .captions import METADATA_FILES, WINDOWS, Note, read_notes, read_text, texts_of
from .edits import EDIT_BOXES, EDIT_MASK, boxes_of, is_none, source_columns, source_paths
from .listing import NO_TARGET, Listing, image_suffixes, list_files, utf8_name
from .record import MASK_COLUMN, Box, Record, Stored, not_storable, part_name, stored_file
from .splits import choose_splits, split_of_image

TEXT_SUFFIXES = (".txt", ".caption")  # the first is taken where there are both
HOW_TO_CAPTION = (
    "Give each image a text file of the same name (fig_1.png, fig_1.txt), or put a metadata.jsonl "
    'next to the images with one line each: {"file_name": "fig_1.png", "caption": "..."}'
)
NOT_LISTED = "listed in the metadata, but not an image file in the folder"
_LOOSE = "no image has its name"
_IN_WINDOWS = "captions in Windows-1252 (no UTF-8)"
_PICTURES = {".heic", ".heif", ".jxl", ".exr", ".svg", ".pdf", ".eps", ".ps"}  # where `mimetypes` may not know them


def folder_records(
    folder: Path,
    listing: Listing,
    caption_column: str,
    split: str | None,
    source_dir: Sequence[Path] = (),
    source_column: Sequence[str] = (),
    table: Path | None = None,
    row_filter: RowFilter | None = None,
) -> tuple[list[Record], Tally]:
    """The captioned images of a folder, and what became of all its files.

    Args:
        folder: of images.
        listing: its files.
        caption_column: of the metadata.
        split: as `choose_splits` takes it.
        source_dir: folders with sources, as `build_cache` takes them.
        source_column: of the metadata, as `source_columns` takes them.
        table: a file that is read as metadata, whatever its name.
        row_filter: leaves out rows, as `find_records` takes it.

    Raises:
        SciflowError: metadata that cannot be read; no image has a caption; a folder without images.
    """
    found = _Folder(folder, listing, caption_column, split, source_dir, source_column, table, row_filter)
    return found.records()


@dataclass(frozen=True)
class _Edit:
    """The reference images of a row, in order, and its changed region; or the reason why it cannot be used."""

    sources: tuple[Path, ...] = ()
    mask: Path | tuple[Box, ...] | None = None
    reason: str = ""


class _Folder:
    def __init__(
        self,
        folder: Path,
        listing: Listing,
        column: str,
        split: str | None,
        source_dir: Sequence[Path],
        source_column: Sequence[str],
        table: Path | None,
        row_filter: RowFilter | None,
    ) -> None:
        self.row_filter, self.columns = row_filter, dict[str, None]()
        self.folder, self.column, self.split, self.table, self.tally = folder, column, split, table, Tally()
        self.source_column, self.source_columns = source_column, list[str]()
        self.source_dirs = [_SourceDir(path, folder) for path in source_dir]
        for link, reason in sorted(listing.closed.items()):
            self.tally.remark(reason, self.name(link))
        for file, reason in sorted(listing.left_out.items()):
            lost = reason == NO_TARGET and file.suffix.lower() in image_suffixes()
            (self.tally.skipped if lost else self.tally.ignored)[self.name(file)] = reason
        self.finder, self.has_splits = _Finder(listing.files), False
        files = self._of_split(listing.files, split)
        self.notes = [file for file in files if file.name in METADATA_FILES or file == self.table]
        self.images = [file for file in files if file.suffix.lower() in image_suffixes()]
        self.texts: dict[str, list[Path]] = {}
        for suffix in TEXT_SUFFIXES:
            for file in files:
                if file.suffix.lower() == suffix:
                    self.texts.setdefault(_key(file.with_suffix("")), []).append(file)
        self.stems = {file.with_suffix("") for file in self.images}
        self.stored: dict[Path, Stored] = {}  # sources, which rows may share
        self.edits: dict[str, _Edit] = {}  # of each row of the metadata, by `where`
        self.others = set(files).difference(self.notes, self.images)  # until something uses them
        self.num_files = len(files)

    def name(self, file: Path) -> str:
        return utf8_name(os.path.relpath(file, self.folder).replace(os.sep, "/"))

    def _of_split(self, files: Sequence[Path], split: str | None) -> list[Path]:
        """The files of the chosen splits, if folders are called train and test; with what lies in neither."""
        if self.table:
            return list(files)
        splits = {file: split_of_image(file.relative_to(self.folder)) for file in files}
        there = sorted({name for file, name in splits.items() if name and file.suffix.lower() in image_suffixes()})
        if "train" not in there or len(there) < 2:
            there, splits = [], dict.fromkeys(files)
        self.has_splits = bool(there)
        if not there and any(file.name in METADATA_FILES for file in files):
            return list(files)  # the metadata may name splits
        chosen = choose_splits(there, split, str(self.folder))
        for file, name in splits.items():
            if name is not None and name not in chosen:
                self.tally.ignored[self.name(file)] = f"of the split {name} (`--split` chooses others)"
        return [file for file, name in splits.items() if name is None or name in chosen]

    def records(self) -> tuple[list[Record], Tally]:
        rows = self._rows()
        listed = [note.columns for notes in rows.values() for note in notes]
        columns = list(dict.fromkeys([*self.columns, *(name for row in listed for name in row)]))
        where = " and ".join(map(str, self.notes)) or str(self.folder)
        if rows and not (self.texts and self.column not in columns and "text" not in columns):
            self.column = caption_column(columns, self.column, where)
        self.source_columns = source_columns(columns, self.source_column, where)
        if self.notes and not self.has_splits:
            choose_splits([], self.split, str(self.folder))
        for note in [note for notes in rows.values() for note in notes]:
            self.edits[note.where] = self._edit_of(note)
        masks = {
            str(row[MASK_COLUMN]): self._file(str(row[MASK_COLUMN]))
            for row in listed
            if not is_none(row.get(MASK_COLUMN))
        }
        no_targets = {*masks.values(), *self._no_targets()} - rows.keys()
        self.others -= no_targets
        self._filter_others(rows.keys() | no_targets)
        images = [file for file in self.images if file not in no_targets]
        for source_dir in self.source_dirs:
            source_dir.match({file: file.relative_to(self.folder) for file in images})
        records = [record for file in images for record in self._of(file, rows, masks)]
        self._count(images, rows)
        if not records:
            raise SciflowError(self._no_caption(images))
        return records, self.tally

    def _file(self, name: str, *folders: Path) -> Path:
        """The file that a row calls `name`, in one of `folders` or in the input."""
        found = (self.finder.find(folder, name) for folder in (*folders, self.folder))
        return next((file for file in found if file), None) or Path(os.path.normpath((*folders, self.folder)[0] / name))

    def _edit_of(self, note: Note) -> _Edit:
        """The edit that a row of the metadata describes."""
        sources: tuple[Path, ...] = ()
        try:
            names = [path for column in self.source_columns for path in source_paths(note.columns.get(column), column)]
            sources = tuple(self._file(name, note.folder) for name in names)
            mask, boxes = note.columns.get(EDIT_MASK), boxes_of(note.columns.get(EDIT_BOXES))
        except ValueError as error:
            return _Edit(sources, None, f"{note.where}: {error}")
        return _Edit(sources, boxes if is_none(mask) else self._file(str(mask), note.folder))

    def _no_targets(self) -> Iterator[Path]:
        """Files that are there for a row of others: masks, and sources without a caption of their own."""
        edits = self.edits.values()
        yield from (edit.mask for edit in edits if isinstance(edit.mask, Path))
        for file in {file for edit in edits for file in edit.sources}:
            if not self.texts.get(_key(file.with_suffix(""))):
                yield file
        sources = {os.path.realpath(file) for source_dir in self.source_dirs for file in source_dir.files}
        yield from (file for file in self.images if sources and os.path.realpath(file) in sources)

    def _of(self, file: Path, rows: dict[Path, list[Note]], masks: Mapping[str, Path]) -> Iterator[Record]:
        """The records of an image: one for each of its captions, and for each of its edits."""
        name = self.name(file)
        notes = rows.pop(file, None) or [Note(str(file), {})]
        found: dict[tuple[str, _Edit], Note] = {}
        for note in notes:
            edit = self._edit(file, note)
            for text in texts_of(note.columns.get(self.column), self.column, note.where):
                if (text, edit) in found:
                    self.tally.remark("images with the same caption twice, taken once", name)
                found.setdefault((text, edit), note)
        if not found:
            try:
                text = self._beside(file)
            except (OSError, ValueError) as error:
                self.tally.skipped[name] = f"its text file cannot be read ({first_line(error)}); save it in UTF-8"
                return
            if not text:
                self.tally.skipped[name] = "no caption"
                return
            for note in notes:
                found.setdefault((text, self._edit(file, note)), note)
        left_out = {self.column, MASK_COLUMN, EDIT_MASK, *self.source_columns}
        for number, ((caption, edit), note) in enumerate(found.items()):
            rest = {k: v for k, v in note.columns.items() if k not in left_out}
            mask = masks[str(note.columns[MASK_COLUMN])] if not is_none(note.columns.get(MASK_COLUMN)) else None
            part = part_name(number)
            record = Record(name, caption, stored_file(file), rest, stored_file(mask) if mask else None, part)
            if edit.reason:
                self.tally.skipped[record.sample] = edit.reason
            elif bad := not_storable(record):
                self.tally.skipped[record.sample] = f"{note.where}: half a character (a surrogate) in `{bad}`"
            else:
                yield self._with_edit(record, edit)

    def _edit(self, file: Path, note: Note) -> _Edit:
        """The edit that leads to an image: as its row says, or from the source folders."""
        edit = self.edits.get(note.where, _Edit())
        if edit.reason or edit.sources or not self.source_dirs:
            return edit
        sources = [source_dir.matched.get(file) for source_dir in self.source_dirs]
        while sources and sources[-1] is None:
            sources.pop()
        if not sources:
            self.tally.remark("images without a source in `--source_dir`, trained from text alone", self.name(file))
        for source, source_dir in zip(sources, self.source_dirs, strict=False):
            if source is None:
                return _Edit(reason=f"the source folder {source_dir.folder} has no file of its name, a later one has")
            if isinstance(source, str):
                return _Edit(reason=source)
        return _Edit(tuple(source for source in sources if isinstance(source, Path)), edit.mask)

    def _with_edit(self, record: Record, edit: _Edit) -> Record:
        if not edit.sources:
            if edit.mask is not None:
                self.tally.remark("changed regions of images without a source, not used", record.name)
            return record
        mask = stored_file(edit.mask) if isinstance(edit.mask, Path) else edit.mask
        return replace(
            record,
            sources=tuple(self.stored.setdefault(file, stored_file(file)) for file in edit.sources),
            source_names=tuple(map(self.name, edit.sources)),
            edit_mask=mask,
        )

    def _beside(self, file: Path) -> str:
        """The caption in the text file of the image's name; "" if there is none."""
        stem = file.with_suffix("")
        texts = self.texts.get(_key(stem), [])
        exact = [text for text in texts if text.with_suffix("") == stem]
        others = [text for text in texts if text.with_suffix("") not in self.stems]
        if not exact and len({text.with_suffix("") for text in others}) != 1:
            return ""
        beside = (exact or others)[0]
        self.others.discard(beside)
        text, encoding = read_text(beside)
        if encoding == WINDOWS:
            self.tally.remark(_IN_WINDOWS, self.name(beside))
        return text.strip()

    def _rows(self) -> dict[Path, list[Note]]:
        """The rows of the metadata by the image they name; of two files that name one image the last counts."""
        rows: dict[Path, list[Note]] = {}
        for file in self.notes:
            mine: dict[Path, list[Note]] = {}
            notes, encoding = read_notes(file)
            if encoding == WINDOWS:
                self.tally.remark(_IN_WINDOWS, self.name(file))
            for note in self._chosen(file, notes):
                image = self.finder.find(file.parent, note.name) or Path(os.path.normpath(file.parent / note.name))
                mine.setdefault(image, []).append(note)
            for image in mine.keys() & rows.keys():
                self.tally.remark("images that two metadata files list, of which the last counts", self.name(image))
            rows |= mine
        return rows

    def _chosen(self, file: Path, notes: Sequence[Note]) -> list[Note]:
        """The rows of the chosen splits that the filter keeps. Files that only others name are not looked at."""
        reasons = self._other_splits(file, notes)
        if self.row_filter is not None:
            there = [i for i, reason in enumerate(reasons) if not reason]
            self.columns |= dict.fromkeys(name for i in there for name in notes[i].columns)
            columns = {name: [notes[i].columns.get(name) for i in there] for name in self.row_filter.columns}
            kept = self.row_filter.mask(columns, len(there)).tolist()
            for i in [i for i, keep in zip(there, kept, strict=True) if not keep]:
                reasons[i] = LEFT_OUT
        taken = [note for note, reason in zip(notes, reasons, strict=True) if not reason]
        if len(taken) < len(notes):
            used = {path for note in taken for path in self._named(note)}
            pairs = [pair for pair in zip(notes, reasons, strict=True) if pair[1]]
            self._leave_out({path: reason for note, reason in pairs for path in self._named(note) if path not in used})
        return taken

    def _other_splits(self, file: Path, notes: Sequence[Note]) -> list[str]:
        """Why a row is of no chosen split ("": it is), where a table without `file_name` has a column `split`."""
        of = [
            str(note.columns["split"]) if note.key != "file_name" and note.columns.get("split") else ""
            for note in notes
        ]
        if not (there := sorted({name for name in of if name})):
            return of
        self.has_splits, chosen = True, choose_splits(there, self.split, str(file))
        return ["" if n in ("", *chosen) else f"of the split {n} (`--split` chooses others)" for n in of]

    def _leave_out(self, files: Mapping[Path, str]) -> None:
        """Files that are not looked at, and why."""
        there = self.others.union(self.images)
        files = {file: reason for file, reason in files.items() if file in there}
        self.tally.ignored |= {self.name(file): reason for file, reason in files.items()}
        self.num_files -= len(files)
        self.images = [image for image in self.images if image not in files]
        self.others -= files.keys()

    def _filter_others(self, known: Collection[Path]) -> None:
        """Leaves out images that no row of the metadata describes, unless the filter keeps rows without values."""
        if self.row_filter is None:
            return
        plain = [file for file in self.images if file not in known]
        kept = self.row_filter.mask({}, len(plain)).tolist()
        left_out = [file for file, keep in zip(plain, kept, strict=True) if not keep]
        texts = [text for file in left_out for text in self.texts.get(_key(file.with_suffix("")), ())]
        self._leave_out(dict.fromkeys([*left_out, *texts], LEFT_OUT))
        self.row_filter.close(f"`input_dir` {str(self.folder)!r}", self.columns)

    def _named(self, note: Note) -> Iterator[Path]:
        """The files in the input that a row of published metadata names."""
        for name in (note.name, note.columns.get("source_image_path")):
            if isinstance(name, str) and (path := self.finder.find(note.folder, name)):
                yield path

    def _count(self, images: Sequence[Path], rows: Mapping[Path, Sequence[Note]]) -> None:
        """Tells of what is left: rows without an image, captioned files that are none, and files nobody wanted."""
        listed = self.others & rows.keys()
        pictures = {_key(file.with_suffix("")) for file in images}
        captioned = self.texts.keys() - pictures
        for file in sorted(self.others):
            stem, name = _key(file.with_suffix("")), self.name(file)
            if file in listed or (stem in captioned and _is_picture(file)):
                self.tally.skipped[name] = _not_decoded(file)
            elif file.suffix.lower() not in TEXT_SUFFIXES:
                self.tally.ignored[name] = _not_decoded(file)
            else:
                self.tally.ignored[name] = "its image has a caption" if stem in pictures else _LOOSE
        for file in rows:
            name = self.name(file)
            if name not in self.tally.skipped and name not in self.tally.ignored:
                same = self.finder.same_name(file)
                self.tally.missing[name] = NOT_LISTED + (f" ({self.name(same)} has its name)" if same else "")
        self.tally.used = self.num_files - len(images) - len(self.others)

    def _no_caption(self, images: Sequence[Path]) -> str:
        found = [f"{len(self.tally.missing)} entries of {self.notes[0].name} that name no image"] if self.notes else []
        found += [f"{name}: {reason}" for name, reason in list(self.tally.missing.items())[:1]]
        loose = [name for name, reason in self.tally.ignored.items() if reason == _LOOSE]
        found += [f"{len(loose)} text files that have no image's name, such as {loose[0]}"] if loose else []
        odd = [name for name in self.tally.ignored if name.endswith((".json", ".csv", ".jsonl", ".tsv", ".xlsx"))]
        found += [f"{odd[0]}, which is not read"] if odd else []
        skipped = {name: reason for name, reason in self.tally.skipped.items() if reason != "no caption"}
        found += [f"{name}: {reason}" for name, reason in list(skipped.items())[:1]]
        looked = f"Looked for {', '.join(METADATA_FILES)} and texts ({', '.join(TEXT_SUFFIXES)}) of the images' names"
        seen = f"; found {'; '.join(found)}" if found else ", of which there are none"
        return (
            f"`input_dir` is {str(self.folder)!r}: none of its {len(images)} images has a caption. {looked}{seen}. "
            f"{HOW_TO_CAPTION}."
        )


def _is_picture(file: Path) -> bool:
    """Whether a file that Pillow does not decode is one that people caption."""
    kind = mimetypes.guess_type(file.name)[0] or ""
    return kind.startswith(("image/", "video/")) or file.suffix.lower() in _PICTURES


def _not_decoded(file: Path) -> str:
    return f"{file.suffix or 'a name without a suffix'} is no format of pictures that Pillow decodes"


class _Finder:
    """Finds the file that a row of metadata means."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.exact = {os.path.normpath(file) for file in files}
        self.loose: dict[str, list[str]] = {}
        self.names: dict[str, list[str]] = {}
        for file in sorted(self.exact):
            self.loose.setdefault(_key(Path(file)), []).append(file)
            self.names.setdefault(_key(Path(os.path.basename(file))), []).append(file)

    def find(self, folder: Path, name: str) -> Path | None:
        """The file called `name` in `folder`: exactly, else with other slashes, capitals or normal forms of Unicode,
        or below folders that end in this one ("train/a.png" in the folder train); None unless there is just one.
        """
        plain = os.path.normpath(folder / name)
        if plain in self.exact:
            return Path(plain)
        parts = PurePosixPath(name.strip().replace("\\", "/")).parts
        here = Path(os.path.abspath(folder)).name
        ends = [0, *(i + 1 for i, part in enumerate(parts) if _plain(part) == _plain(here))]
        for start in ends:
            path = folder.joinpath(*parts[start:]) if start < len(parts) else folder
            found = self.loose.get(_key(path), [])
            if len(found) == 1:
                return Path(found[0])
        return None

    def same_name(self, file: Path) -> Path | None:
        """A file of that name in another folder, if there is just one."""
        found = self.names.get(_key(Path(file.name)), [])
        return Path(found[0]) if len(found) == 1 else None


class _SourceDir:
    """A folder with sources: which of them belongs to which image.

    Args:
        folder: that is read.
        images: the folder of the images.

    Attributes:
        files: the images in it.
        matched: after `match`: of each image its source, or why there is none although one has its name.

    Raises:
        SciflowError: it is no folder of images, or holds `images`.
    """

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self.matched = folder, dict[Path, Path | str]()
        files = list_files(folder).files if folder.is_dir() else []
        self.files = [file for file in files if file.suffix.lower() in image_suffixes()]
        if not self.files:
            what = f"holds no images, but {what_lies_there(files)}" if folder.is_dir() else "is no folder"
            raise SciflowError(
                f"`source_dir` {str(folder)!r} {what}. Name a folder with a reference image for each image of "
                "`--input_dir`, of the same file name."
            )
        if Path(os.path.realpath(images)).is_relative_to(os.path.realpath(folder)):
            raise SciflowError(
                f"`source_dir` {str(folder)!r} holds `--input_dir` {str(images)!r} itself. Put the reference images "
                "into a folder of their own."
            )
        self.finder, self.stems = _Finder(self.files), dict[str, list[Path]]()
        for file in self.files:
            self.stems.setdefault(_key(file.with_suffix("")), []).append(file)

    def match(self, images: Mapping[Path, Path]) -> None:
        """Finds the source of each image {file: path below the input}: of the same path, or of its end."""
        found: dict[Path, tuple[Path, int]] = {}
        for file, path in images.items():
            for start in range(len(path.parts)):
                if source := self._find(Path(*path.parts[start:])):
                    found[file] = source, start
                    break
        claims = Counter(source for source, _ in found.values())
        for file, (source, start) in found.items():
            several = f"{claims[source]} images have the name of the source {source}: use the same folders there"
            self.matched[file] = several if start and claims[source] > 1 else source

    def _find(self, path: Path) -> Path | None:
        """The source of that path, or of that path with the suffix of another format."""
        alike = self.stems.get(_key(self.folder / path.with_suffix("")), [])
        return self.finder.find(self.folder, str(path)) or (alike[0] if len(alike) == 1 else None)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _key(file: Path) -> str:
    return _plain(os.path.normpath(file))


def caption_column(columns: Sequence[str], wanted: str, where: str) -> str:
    """The column with the captions: the one that is wanted, or "text" or "prompt" for "caption".

    Raises:
        SciflowError: there is none.
    """
    if wanted in columns:
        return wanted
    for other in ("text", "prompt") if wanted == "caption" else ():
        if other in columns:
            return other
    raise SciflowError(
        f"`caption_column` is {wanted!r}, but {where} has only {', '.join(map(repr, columns))}. Name the "
        "column that holds the captions by `--caption_column`."
    )


def listed_records(
    table: Path,
    caption_column: str,
    split: str | None,
    source_column: Sequence[str] = (),
    row_filter: RowFilter | None = None,
) -> tuple[list[Record], Tally]:
    """The captioned images that a table of any name lists, relative to its folder; see `folder_records`."""
    folder = Path(os.path.abspath(table)).parent
    table = folder / table.name
    named = {Path(os.path.normpath(folder / note.name)) for note in read_notes(table)[0]}
    files = sorted({table, *(file for file in named if file.is_file())})
    return folder_records(folder, Listing(files), caption_column, split, (), source_column, table, row_filter)


def what_lies_there(files: Iterable[Path]) -> str:
    """The files of a folder without images, by suffix."""
    kinds = Counter(file.suffix or "without a suffix" for file in files)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
