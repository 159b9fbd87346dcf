//! Volumes that Linux wrote: read, and rewritten to the very bytes.

use crate::rig::{MIB, Place};
use serde::Deserialize;
use shake::{ExtendableOutput as _, Update as _, XofReader as _};
use std::fs;
use std::io::Read as _;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Manifest {
    images: Vec<Image>,
}

#[derive(Deserialize)]
pub(crate) struct Image {
    pub(crate) name: String,
    image: String,
    /// The line by which the kernel wrote it.
    pub(crate) table: String,
    cipher: String,
    pub(crate) key: String,
    iv_offset: u64,
    sector_size: u32,
    pub(crate) data_byte_offset: usize,
    pub(crate) data_len: usize,
    plaintext_rule: String,
}

impl Image {
    /// The whole image.
    pub(crate) fn whole(&self) -> Vec<u8> {
        let file = fs::File::open(vectors().join(format!("{}.zst", self.image))).unwrap();
        let mut image = Vec::new();
        ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut image).unwrap();
        image
    }

    /// What dm-crypt has on the disk behind its offset.
    fn data_area(&self) -> Vec<u8> {
        self.whole()[self.data_byte_offset..][..self.data_len].to_vec()
    }

    pub(crate) fn plaintext(&self) -> Vec<u8> {
        plaintext_by(&self.plaintext_rule, self.data_len)
    }

    /// What `serve` calls the cipher.
    fn mode(&self) -> &'static str {
        match self.cipher.as_str() {
            "aes-xts-plain64" => "AES-256-XTS",
            "capi:essiv(cbc(aes),sha256)-plain64" => "AES-128-CBC-ESSIV",
            "capi:adiantum(xchacha12,aes)-plain64" => "Adiantum",
            other => panic!("no mode is known for {other}"),
        }
    }

    fn arguments(&self) -> Vec<String> {
        let data_unit = self.sector_size.to_string();
        ["--key", "raw:key", "--mode", self.mode(), "--data-unit", &data_unit, "--iv-offset"]
            .map(str::to_owned)
            .into_iter()
            .chain([self.iv_offset.to_string(), "disk".to_owned()])
            .collect()
    }
}

/// The plaintext of a rule `SHAKE-256("text")`.
pub(crate) fn plaintext_by(rule: &str, len: usize) -> Vec<u8> {
    let text = rule.strip_prefix("SHAKE-256(\"").unwrap().strip_suffix("\")").unwrap();
    let mut hasher = shake::Shake256::default();
    hasher.update(text.as_bytes());
    let mut plaintext = vec![0; len];
    hasher.finalize_xof().read(&mut plaintext);
    plaintext
}

pub(crate) fn vectors() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../cipher/vectors")
}

pub(crate) fn images() -> Vec<Image> {
    let text = fs::read_to_string(vectors().join("dm-crypt.json")).unwrap();
    let Manifest { images } = serde_json::from_str(&text).unwrap();
    assert_eq!(images.len(), 4);
    images
}

/// A place with the image's key and a disk of this content.
fn place_with(image: &Image, disk: &[u8]) -> Place {
    let place = Place::new();
    place.secret("key", &hex::decode(&image.key).unwrap());
    fs::write(place.path("disk"), disk).unwrap();
    place
}

#[test]
fn images_of_dm_crypt_are_read_through_nbd() {
    for image in images() {
        let place = place_with(&image, &image.data_area());
        let server = place.serve([image.arguments(), vec!["--read-only".to_owned()]].concat());
        let mut client = server.client("disk");
        assert_eq!(client.export().size, image.data_len as u64);
        let read = client.read(0, u32::try_from(image.data_len).unwrap()).unwrap();
        assert!(read == image.plaintext(), "{}", image.name);
        server.stop();
        assert!(fs::read(place.path("disk")).unwrap() == image.data_area(), "{}", image.name);
    }
}

#[test]
fn what_is_written_through_nbd_are_the_bytes_of_dm_crypt() {
    for image in images() {
        let (plaintext, expected) = (image.plaintext(), image.data_area());
        // Once whole, once in pieces of one logical block from the end on, once in pieces that suit nothing.
        let block = if image.mode() == "AES-256-XTS" { 512 } else { image.sector_size as usize };
        for piece in [image.data_len, block, 13 * block] {
            let place = place_with(&image, &vec![0xee; image.data_len]);
            let server = place.serve(image.arguments());
            let mut client = server.client("disk");
            let pieces: Vec<(usize, &[u8])> = plaintext.chunks(piece).enumerate().collect();
            for (index, piece_data) in pieces.into_iter().rev() {
                client.write((index * piece) as u64, piece_data).unwrap();
            }
            client.flush().unwrap();
            assert!(fs::read(place.path("disk")).unwrap() == expected, "{}, {piece}", image.name);
            // And over itself.
            client.write(0, &plaintext).unwrap();
            server.stop();
            assert!(fs::read(place.path("disk")).unwrap() == expected, "{}, {piece}, again", image.name);
        }
    }
}

/// The layout is that of `aes-xts-plain64` also past the first images: the same key and offset at another size.
#[test]
fn another_iv_offset_or_data_unit_reads_noise() {
    let image = images().swap_remove(1);
    assert_eq!((image.sector_size, image.iv_offset), (4096, 34_359_738_360));
    for (data_unit, iv_offset) in [("512", "34359738360"), ("4096", "34359738368"), ("4096", "0")] {
        let place = place_with(&image, &image.data_area());
        let server =
            place.serve(["--key", "raw:key", "--data-unit", data_unit, "--iv-offset", iv_offset, "disk"]);
        let read = server.client("disk").read(0, u32::try_from(image.data_len).unwrap()).unwrap();
        let plaintext = image.plaintext();
        let same = read.chunks(512).zip(plaintext.chunks(512)).filter(|(read, plain)| read == plain).count();
        assert_eq!(same, 0, "{data_unit} {iv_offset}");
        server.stop();
    }
}

/// A partition of a disk: the data lies at an offset, as dm-crypt's table says. A loop device gives it its own file.
#[test]
fn a_block_device_that_dm_crypt_wrote_is_served_in_place() {
    use inlinecrypt_testkit::{require_tool, undo::LoopDevice};
    if !crate::rig::may_loop() || require_tool("losetup").is_none() {
        return;
    }
    let image = images().swap_remove(0);
    let place = Place::new();
    place.secret("key", &hex::decode(&image.key).unwrap());
    let mut whole = vec![0x11; image.data_byte_offset];
    whole.extend(image.data_area());
    whole.resize(usize::try_from(MIB).unwrap(), 0x22);
    fs::write(place.path("whole"), &whole).unwrap();
    let (offset, limit) = (image.data_byte_offset.to_string(), image.data_len.to_string());
    let device =
        LoopDevice::new(&place.path("whole"), &["--offset", &offset, "--sizelimit", &limit]).unwrap();
    for direct in [false, true] {
        let mut arguments = image.arguments();
        *arguments.last_mut().unwrap() = device.path().display().to_string();
        arguments.extend(["--name", "disk"].map(str::to_owned));
        arguments.extend(direct.then(|| "--direct".to_owned()));
        let server = place.serve(arguments);
        let mut client = server.client("disk");
        assert!(
            client.read(0, u32::try_from(image.data_len).unwrap()).unwrap() == image.plaintext(),
            "{direct}"
        );
        client.write(0, &image.plaintext()).unwrap();
        client.flush().unwrap();
        server.stop();
    }
    device.detach().unwrap();
    assert!(fs::read(place.path("whole")).unwrap() == whole);
}
