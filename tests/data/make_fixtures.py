#!/usr/bin/env python3
"""Make the fixtures: run each recipe in the kernel, then record what the tools say.

    make_fixtures.py --kernel-run KERNEL_RUN --new "CMD" [--old "CMD"] \\
                     --recipes recipes --dest . [NAME...]

--new and --old say how to run the thin tools of version 1.1.0 and 0.9.0: the
name of the tool and its arguments are added to the command.

For each recipe NAME.sh this makes, in --dest:

    NAME.img.xz       the metadata image
    NAME.xml          thin_dump of 1.1.0 (NAME.xml.xz when it is large)
    NAME.ls.txt       thin_ls of 1.1.0
    NAME.lsfull.txt   thin_ls of 1.1.0, every column
    NAME.status.txt   dmsetup status of the devices, at the end of the recipe
    NAME.check.txt    thin_check of both versions: exit status and output
    NAME.reopen.txt   dmsetup status after the kernel opened the image once more
    NAME.metasnap.xml, NAME.metasnap.ls.txt   when a metadata snapshot is held

and then a table of them all in MANIFEST.md (between two marker lines, if the
file exists already).

The recipe's header gives its sizes.  The image is checked: both versions of
thin_check, the dump restored and dumped again, and the kernel's own idea of
every mapping (see check_xml of the guest's helper functions) against the dump.
"""

import argparse
import json
import lzma
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, HERE)
import thin_image  # noqa: E402

PLAIN_XML_LIMIT = 16 << 10
LS_COLUMNS = ("DEV,MAPPED_BLOCKS,EXCLUSIVE_BLOCKS,SHARED_BLOCKS,MAPPED_SECTORS,"
              "EXCLUSIVE_SECTORS,SHARED_SECTORS,MAPPED_BYTES,EXCLUSIVE_BYTES,SHARED_BYTES,"
              "MAPPED,EXCLUSIVE,SHARED,TRANSACTION,CREATE_TIME,SNAP_TIME")
BEGIN, END = "<!-- table begins -->", "<!-- table ends -->"


def header(path):
    h = {}
    with open(path) as f:
        for line in f:
            m = re.match(r"# ([a-z-]+): (.*)", line)
            if not m:
                break
            h[m.group(1)] = m.group(2).strip()
    return h


class Tools:
    def __init__(self, a):
        self.new = shlex.split(a.new)
        self.old = shlex.split(a.old) if a.old is not None else None

    def run(self, which, words, cwd):
        base = self.new if which == "new" else self.old
        p = subprocess.run(base + words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return p.returncode, p.stdout, p.stderr


def stamp_image(path, sectors, blocks, size):
    """A sparse data image in which each block holds its own number (the marks
    that read_map and check_xml look for)."""
    rest = bytes(512 - 32)
    with open(path, "wb") as f:
        f.truncate(size)
        for n in range(blocks):
            os.pwrite(f.fileno(), struct.pack("<8sQQQ", b"kr-stamp", n, n, n) + rest,
                      n * sectors * 512)


def squeeze(src, dst):
    with open(src, "rb") as f:
        data = f.read()
    with open(dst, "wb") as f:
        f.write(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def clean(name, dest):
    for suffix in ("img.xz", "xml", "xml.xz", "ls.txt", "lsfull.txt", "status.txt", "check.txt",
                   "reopen.txt", "metasnap.xml", "metasnap.xml.xz", "metasnap.ls.txt"):
        try:
            os.unlink(os.path.join(dest, "%s.%s" % (name, suffix)))
        except FileNotFoundError:
            pass


def keep_xml(src, name, dest):
    if os.path.getsize(src) <= PLAIN_XML_LIMIT:
        with open(src) as i, open(os.path.join(dest, name), "w") as o:
            o.write(i.read())
    else:
        squeeze(src, os.path.join(dest, name + ".xz"))


def plain(table):
    """A table of thin_ls without the differences of layout: 0.9.0 writes a size
    of nothing as 0, 1.1.0 as 0b."""
    return [["0" if w == "0b" else w for w in line.split()] for line in table.decode().splitlines()]


def describe(image):
    devs = image.devices()
    roots = image.roots()
    data = image.sm_root("data")
    meta = image.sm_root("meta")
    return {
        "devices": len(devs),
        "mappings": sum(d[0] for d in devs.values()),
        "tree": max([image.depth(r) for r in roots.values()], default=0),
        "top": image.depth(image.mapping_root),
        "details": image.depth(image.details_root),
        "block_sectors": image.sb("I", thin_image.OFF_DATA_BLOCK_SIZE),
        "data_blocks": data[0], "data_used": data[1],
        "meta_blocks": meta[0], "meta_used": meta[1],
        "data_overflow": len(image.overflow("data")),
        "meta_overflow": len(image.overflow("meta")),
        "time": image.sb("I", thin_image.OFF_TIME),
        "transaction": image.sb("Q", thin_image.OFF_TRANS_ID),
        "flags": image.sb("I", thin_image.OFF_FLAGS),
        "held": image.sb("Q", thin_image.OFF_HELD_ROOT),
    }


def check_text(tools, image, work):
    text, codes, outputs = [], {}, {}
    for which, version in (("new", "1.1.0"), ("old", "0.9.0")):
        if which == "old" and tools.old is None:
            continue
        code, out, err = tools.run(which, ["thin_check", image], work)
        codes[which] = code
        outputs[which] = (out + err).decode(errors="replace")
        text.append("== thin_check %s: exit status %d\n-- stdout\n%s-- stderr\n%s" %
                    (version, code, out.decode(errors="replace"), err.decode(errors="replace")))
    return "\n".join(text), codes, outputs


def make(recipe, a, tools):
    name = os.path.splitext(os.path.basename(recipe))[0]
    h = header(recipe)
    problems = []
    notes = []
    clean(name, a.dest)
    with tempfile.TemporaryDirectory(prefix="fixture.") as work:
        img = name + ".img"
        path = os.path.join(work, img)
        out = os.path.join(work, "out")
        cmd = [a.kernel_run, "--meta", path, "--meta-size", h["meta-size"],
               "--data-size", h["data-size"], "--out", out, "--timeout", h.get("timeout", "300"),
               "--mem", h.get("mem", "256"), "--dmesg", os.path.join(work, "dmesg"), recipe]
        p = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        log = p.stdout.decode(errors="replace")
        with open(os.path.join(a.logs, name + ".log"), "w") as f:
            f.write(log + "\n---- kernel messages\n")
            with open(os.path.join(work, "dmesg"), errors="replace") as d:
                f.write("".join(line for line in d if "device-mapper" in line))
        if p.returncode:
            problems.append("the recipe ended with status %d" % p.returncode)
        with open(os.path.join(out, "status.txt")) as f:
            status = f.read()
        with open(os.path.join(a.dest, name + ".status.txt"), "w") as f:
            f.write(status)
        text, codes, outputs = check_text(tools, img, work)
        with open(os.path.join(a.dest, name + ".check.txt"), "w") as f:
            f.write(text)
        # A kill may leave data blocks that were allocated but not mapped yet.
        if not h.get("check") and not h.get("dirty") and any(codes.values()):
            problems.append("thin_check: %r" % codes)

        # Dumps of both versions, and the way back.
        code, xml, err = tools.run("new", ["thin_dump", img], work)
        if code:
            problems.append("thin_dump: status %d %s" % (code, err.decode()))
        with open(os.path.join(work, "new.xml"), "wb") as f:
            f.write(xml)
        keep_xml(os.path.join(work, "new.xml"), name + ".xml", a.dest)
        content = thin_image.read_xml(xml)
        agree = "-"
        if tools.old is not None:
            code, old, err = tools.run("old", ["thin_dump", img], work)
            agree = "same" if code == 0 and thin_image.read_xml(old) == content else \
                "differs (status %d)" % code
            with open(os.path.join(work, "old.xml"), "wb") as f:
                f.write(old)
        for which in ("new", "old") if tools.old is not None else ("new",):
            back = which + ".bin"
            with open(os.path.join(work, back), "wb") as f:
                f.truncate(max(os.path.getsize(path), 4 << 20))
            code, _, err = tools.run(which, ["thin_restore", "-i", which + ".xml", "-o", back], work)
            code2, again, err2 = tools.run(which, ["thin_dump", back], work)
            if code or code2 or thin_image.read_xml(again) != content:
                problems.append("thin_restore (%s) does not give the dump back: %d %d %s" %
                                (which, code, code2, (err + err2).decode()))
            _, codes2, _ = check_text(tools, back, work)
            if any(codes2.values()):
                problems.append("thin_check of the restored metadata: %r" % codes2)

        code, ls, err = tools.run("new", ["thin_ls", img], work)
        if code:
            problems.append("thin_ls: status %d %s" % (code, err.decode()))
        with open(os.path.join(a.dest, name + ".ls.txt"), "wb") as f:
            f.write(ls)
        code, full, err = tools.run("new", ["thin_ls", "-o", LS_COLUMNS, img], work)
        if code:
            problems.append("thin_ls -o: status %d %s" % (code, err.decode()))
        with open(os.path.join(a.dest, name + ".lsfull.txt"), "wb") as f:
            f.write(full)
        if tools.old is not None:
            _, old_ls, _ = tools.run("old", ["thin_ls", img], work)
            _, old_full, _ = tools.run("old", ["thin_ls", "-o", LS_COLUMNS, img], work)
            if plain(old_ls) != plain(ls):
                notes.append("thin_ls differs between the versions")
            if plain(old_full) != plain(full):
                notes.append("thin_ls -o differs between the versions")
                with open(os.path.join(a.logs, name + ".old.lsfull.txt"), "wb") as f:
                    f.write(old_full)

        image = thin_image.Image.load(path)
        d = describe(image)
        if d["held"]:
            code, snap, err = tools.run("new", ["thin_dump", "-m", img], work)
            if code:
                problems.append("thin_dump -m: status %d %s" % (code, err.decode()))
            with open(os.path.join(work, "snap.xml"), "wb") as f:
                f.write(snap)
            keep_xml(os.path.join(work, "snap.xml"), name + ".metasnap.xml", a.dest)
            code, ls, err = tools.run("new", ["thin_ls", "-m", img], work)
            with open(os.path.join(a.dest, name + ".metasnap.ls.txt"), "wb") as f:
                f.write(ls)
            if code:
                notes.append("thin_ls -m: status %d %s" % (code, err.decode().strip()))
            if tools.old is not None:
                code, old, _ = tools.run("old", ["thin_dump", "-m", img], work)
                if code or thin_image.read_xml(old) != thin_image.read_xml(snap):
                    notes.append("thin_dump -m of 0.9.0 differs (status %d)" % code)

        # The kernel's idea of it all: open a copy over data blocks that carry marks.
        size = d["data_blocks"] * d["block_sectors"] * 512
        data = os.path.join(work, "data")
        stamp_image(data, d["block_sectors"], d["data_blocks"], size)
        script = os.path.join(work, "reopen.sh")
        with open(script, "w") as f:
            f.write('ids=$(thin_ids)\npool_create skip_block_zeroing || exit\n'
                    'activate_all <(echo "$ids") || exit\nstatus_all >"$OUT/reopen.txt"\n'
                    'check_xml "$1"\n')
        cmd = [a.kernel_run, "--meta", path, "--scratch", "--data", data, "--out", out,
               "--mem", h.get("mem", "256"), "--timeout", "900", script, os.path.join(work, "new.xml")]
        if size < 1 << 40:
            p = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            lines = p.stdout.decode(errors="replace").splitlines()
            n = sum(line.endswith("agree") for line in lines)
            with open(os.path.join(a.logs, name + ".reopen.log"), "w") as f:
                f.write("\n".join(lines) + "\n")
            if p.returncode or n != d["devices"]:
                problems.append("reopened by the kernel: status %d, %d of %d devices agree: %s" %
                                (p.returncode, n, d["devices"], lines[-2:]))
            with open(os.path.join(out, "reopen.txt")) as i, \
                    open(os.path.join(a.dest, name + ".reopen.txt"), "w") as o:
                o.write(i.read())
        squeeze(path, os.path.join(a.dest, name + ".img.xz"))
    d.update(name=name, about=h["about"], dump_090=agree, notes=notes, problems=problems,
             codes=codes, dirty=h.get("dirty"), check=h.get("check"),
             size=os.path.getsize(os.path.join(a.dest, name + ".img.xz")),
             xml="xml" if os.path.exists(os.path.join(a.dest, name + ".xml")) else "xml.xz")
    with open(os.path.join(a.logs, name + ".json"), "w") as f:
        json.dump(d, f)
    return d


def block_text(sectors):
    n = sectors // 2
    return "%d GiB" % (n >> 20) if n % (1 << 20) == 0 else \
        "%d MiB" % (n >> 10) if n % 1024 == 0 else "%d KiB" % n


def row(d):
    codes = "1.1.0: %s, 0.9.0: %s" % (d["codes"].get("new", "-"), d["codes"].get("old", "-"))
    extra = []
    if d["flags"]:
        extra.append("flags %d" % d["flags"])
    if d["held"]:
        extra.append("metadata snapshot at block %d" % d["held"])
    if d["transaction"]:
        extra.append("transaction %d" % d["transaction"])
    if d["data_overflow"]:
        extra.append("%d data counts above 2" % d["data_overflow"])
    if d["meta_overflow"]:
        extra.append("%d metadata counts above 2" % d["meta_overflow"])
    if d["dump_090"] not in ("same", "-"):
        extra.append("thin_dump 0.9.0 " + d["dump_090"])
    extra += d["notes"]
    return "| `%s` | %s | %s | %d | %d | %d/%d/%d | %d of %d | %d of %d | %s | %d | %s |" % (
        d["name"], d["about"], block_text(d["block_sectors"]), d["devices"], d["mappings"],
        d["tree"], d["top"], d["details"], d["data_used"], d["data_blocks"], d["meta_used"],
        d["meta_blocks"], codes, d["size"], "; ".join(extra) or "-")


def manifest(a):
    rows = []
    for recipe in sorted(os.listdir(a.recipes)):
        path = os.path.join(a.logs, os.path.splitext(recipe)[0] + ".json")
        if recipe.endswith(".sh") and os.path.exists(path):
            with open(path) as f:
                rows.append(row(json.load(f)))
    table = "\n".join([
        BEGIN,
        "| name | what it exercises | data block | devices | mappings | tree levels: device/top/details"
        " | data blocks in use | metadata blocks in use | thin_check exit status | bytes packed | more |",
        "|---|---|---|---|---|---|---|---|---|---|---|"] + rows + [END])
    path = os.path.join(a.dest, "MANIFEST.md")
    try:
        with open(path) as f:
            text = f.read()
    except FileNotFoundError:
        text = "# Fixtures\n\n%s\n%s\n" % (BEGIN, END)
    text = text[:text.index(BEGIN)] + table + text[text.index(END) + len(END):]
    with open(path, "w") as f:
        f.write(text)


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--kernel-run", required=True)
    ap.add_argument("--new", required=True)
    ap.add_argument("--old")
    ap.add_argument("--recipes", default=os.path.join(HERE, "recipes"))
    ap.add_argument("--dest", default=".")
    ap.add_argument("--logs", required=True, help="directory for logs and for what the table needs")
    ap.add_argument("names", nargs="*")
    a = ap.parse_args()
    os.makedirs(a.logs, exist_ok=True)
    tools = Tools(a)
    bad = 0
    names = a.names or sorted(os.path.splitext(n)[0] for n in os.listdir(a.recipes)
                              if n.endswith(".sh"))
    for name in names:
        started = time.monotonic()
        d = make(os.path.join(a.recipes, name + ".sh"), a, tools)
        print("%-30s %7d bytes %4d s %s %s" % (name, d["size"], time.monotonic() - started,
                                               d["notes"], d["problems"] or "ok"), flush=True)
        bad += bool(d["problems"])
    manifest(a)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
