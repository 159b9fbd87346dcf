"""fscrypt's ioctls, of which no program of the base system makes all: `fscrypt.py VERB ...`.

add MOUNT KEYFILE [DESCRIPTOR]      prints the identifier, or takes the descriptor
remove MOUNT IDENTIFIER|DESCRIPTOR
policy DIR CONTENTS NAMES FLAGS LOG2 IDENTIFIER|DESCRIPTOR

Layouts and numbers are those of include/uapi/linux/fscrypt.h. Exit code 3: the kernel does not do this.
"""

import errno
import fcntl
import os
import struct
import sys

ADD_KEY, REMOVE_KEY, SET_POLICY = 0xC0506617, 0xC0406618, 0x800C6613


def spec(name):
    """A struct fscrypt_key_specifier; no name: an identifier that the kernel fills in."""
    kind = 1 if len(name) == 8 else 2
    return struct.pack("<II32s", kind, 0, name)


def call(path, number, argument):
    directory = os.open(path, os.O_RDONLY)
    try:
        buffer = bytearray(argument)
        fcntl.ioctl(directory, number, buffer)
        return buffer
    except OSError as error:
        print(error, file=sys.stderr)
        unsupported = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOPKG, errno.EINVAL)
        sys.exit(3 if error.errno in unsupported else 1)
    finally:
        os.close(directory)


verb, path, rest = sys.argv[1], sys.argv[2], sys.argv[3:]
if verb == "add":
    key = open(rest[0], "rb").read()
    name = bytes.fromhex(rest[1]) if len(rest) > 1 else b""
    argument = spec(name) + struct.pack("<III28x", len(key), 0, 0) + key
    print(call(path, ADD_KEY, argument)[8:24].hex())
elif verb == "remove":
    call(path, REMOVE_KEY, spec(bytes.fromhex(rest[0])) + bytes(24))
elif verb == "policy":
    contents, names, flags, log2 = map(int, rest[:4])
    name = bytes.fromhex(rest[4])
    if len(name) == 8:
        call(path, SET_POLICY, struct.pack("<BBBB8s", 0, contents, names, flags, name))
    else:
        call(path, SET_POLICY, struct.pack("<BBBBB3x16s", 2, contents, names, flags, log2, name))
