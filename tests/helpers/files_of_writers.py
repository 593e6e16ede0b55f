"""Small files that the writers of Megatron-LM and mosaicml-streaming themselves wrote.

From megatron-core 0.16.1: `IndexedDatasetBuilder(dtype=numpy.uint16)` with `add_document(ids, [2,
len(ids) - 2])`, two sequences per document. From mosaicml-streaming 0.13.0: `MDSWriter`, once per
folder, with the columns and options of its index.json.
`benchmarks/import_shards.py` calls the writers directly.
"""

import base64
from pathlib import Path

END_ID = 2
DOCUMENTS = [[305, 306, 307], [308], [500, 301, 302, 303]]
"""The documents, which END_ID follows in the files."""

_FILES = {
    "m.bin": base64.b85decode("F#$3GGXVksGywtt^Z_jaE&(qA0ss"),
    "m.idx": base64.b85decode(
        "O-)HeNkmux009610000000;&E00000000C4000000006200062000620000000062000930000000000"
        "000C400000000O800000000aC00000000aC00000000mG0000000000000000006200000000C400000"
        "000I600000000"
    ),
    "arrays/index.json": (
        b'{"shards": [{"column_encodings": ["ndarray:int32"], "column_names": ["tokens"], '
        b'"column_sizes": [null], "compression": "zstd", "format": "mds", "hashes": ["sha1",'
        b' "xxh64"], "raw_data": {"basename": "shard.00000.mds", "bytes": 276, "hashes": '
        b'{"sha1": "326c01c639f22d82cc7406720e9c68d02bde52ea", "xxh64": '
        b'"60b5350813d20bb0"}}, "samples": 3, "size_limit": null, "version": 2, "zip_data": '
        b'{"basename": "shard.00000.mds.zstd", "bytes": 214, "hashes": {"sha1": '
        b'"6c3c1c8775dc29e276eefe4bde4e179235383f83", "xxh64": "901c65f8e3b9b320"}}}], '
        b'"version": 2}'
    ),
    "arrays/shard.00000.mds.zstd": base64.b85decode(
        "D77#BU=#pl1^|)^C@hdEX$-rX=XZB^clQs-s^5qWXv;-#iR|9?zB6lpdTWJ8&C=;H)er5HodUn|3E|Vh"
        "CxcHG0R<05;8#95J~5vf48}h&!NdlUYH`m!kQTXpBsh~vV>z47E@#<;){BrK)shU_C{>dR-ENBy?|CE|"
        "xm|4z5NdC!S{9OVK<b)^72{%>3aZI%P{&|I8$_SvfsvH>MDSny6+guf5D)+$h?t4Xu>-?|4%@0~5)A!p"
        "uGbZ2nl`R!$5kVPVf^I9s6ki}3JL"
    ),
    "any/index.json": (
        b'{"shards": [{"column_encodings": ["ndarray"], "column_names": ["tokens"], '
        b'"column_sizes": [null], "compression": "gz", "format": "mds", "hashes": [], '
        b'"raw_data": {"basename": "shard.00000.mds", "bytes": 234, "hashes": {}}, '
        b'"samples": 3, "size_limit": null, "version": 2, "zip_data": {"basename": '
        b'"shard.00000.mds.gz", "bytes": 186, "hashes": {}}}], "version": 2}'
    ),
    "any/shard.00000.mds.gz": base64.b85decode(
        "ABzY8^(GE$0{>%XU|`q}#OHwcCJ?^@;%cSj{G8I<y!h0-<ouM(y!2uvD}`vKyp+VEqQpw2SRDnJg1p4s"
        "RET6res*eJF|u57W)(y(uQVqIBA#1Nlv-SznV$y~R!Xl@0t%+(7v(0FfcUv7#UO!<#NrHyK9C-eA@Mnx"
        "xtSm(AcKHnWvN9_GmL7vfzB0RVKHPhVl-xCVqgbznM{C8UNDpO3!^Th9-}@`005^Spr+~o000"
    ),
    "rows/index.json": (
        b'{"shards": [{"column_encodings": ["bytes"], "column_names": ["tokens"], '
        b'"column_sizes": [null], "compression": null, "format": "mds", "hashes": [], '
        b'"raw_data": {"basename": "shard.00000.mds", "bytes": 289, "hashes": {}}, '
        b'"samples": 3, "size_limit": null, "version": 2, "zip_data": null}], "version": 2}'
    ),
    "rows/shard.00000.mds": base64.b85decode(
        "0{{R3y#N3J;Q#;t1pxp6AprmYdm>|RY;|pJUuAA%Z)9n1XLBMtAX_40d30rSB3&#XB4clCb!~26ZeeX@"
        "b0Rt*TOxFCYh`Y8B3&#XB4clCb!~26b7^{Ib0Rt*TW)o1Y+WoMB4clDaB^jHb7^mGB03;$b!==bAR=aO"
        "a&2LBB03-<ZDeyIEFdCiVRL9@b0Rt*TU{(5B6DeaWnXM*ZE18OIv{R!Y-}tbB6ekRb7^mGB03;4eINh;"
        "05Jgo0000005Smp0000005bsq0000000IC20000003ZMW05kyr0000000IC2000000Q3O>0000004)Ik"
        "0000002lxO04@Ol00000051Um0000000IC20000000"
    ),
    "fixed/index.json": (
        b'{"shards": [{"column_encodings": ["str", "ndarray:uint16:4"], "column_names": '
        b'["id", "tokens"], "column_sizes": [null, 8], "compression": null, "format": "mds",'
        b' "hashes": ["md5"], "raw_data": {"basename": "shard.00000.mds", "bytes": 245, '
        b'"hashes": {"md5": "55988c5b1609d1f44c968c816118ba25"}}, "samples": 2, '
        b'"size_limit": null, "version": 2, "zip_data": null}], "version": 2}'
    ),
    "fixed/shard.00000.mds": base64.b85decode(
        "0ssI2*#H0l=Kufz^#A|>dm>|RY;|pJUuAA%Z)9n1XLBMtAX_4HbaEmrAR=yLVRCX|c{+7zZgep=Iy53("
        "EFdCdZ)|mKZeMO;ZDn&JIv`sjX=EZSAR=^cYh`Y8B3&#XB4clCb!~26b7^{Ib0Rt*TW)o1Y%Cx+T`V9X"
        "V{dJ6a%FRKX>V>KIv{R!Y-}tbB4%%LZDDjGIv^r#WOE`cAR=gCb7*CAB03;jB5h<fB3&#XB6DeaWnXM*"
        "ZE18OIv{R!Y-}tbB6ekRb7^mGB03;4eF6Xg0C+Gl0WtwI0RjL50001ZF*E@J0Q3PZ0R"
    ),
}


def write_files(folder: Path) -> None:
    """Write the files to a folder: `m.bin` with `m.idx`, and folders of MDS."""
    for name, data in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
