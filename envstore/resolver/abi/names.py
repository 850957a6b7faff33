"""Names of libraries, and what they stand for."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

GLIBC = frozenset(
    {
        "libc.so.6",
        "libm.so.6",
        "libmvec.so.1",
        "libdl.so.2",
        "librt.so.1",
        "libpthread.so.0",
        "libutil.so.1",
        "libresolv.so.2",
        "libanl.so.1",
        "libBrokenLocale.so.1",
        "libthread_db.so.1",
        "libnss_files.so.2",
        "libnss_dns.so.2",
        "libnss_compat.so.2",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
        "ld-linux-armhf.so.3",
        "ld-linux.so.2",
        "ld64.so.1",
        "ld64.so.2",
        "ld-linux-riscv64-lp64d.so.1",
        "linux-vdso.so.1",
        "linux-gate.so.1",
    }
)
"""The C library and its parts: always the machine's own, whatever else lies on the path."""
GCC = frozenset({"libgcc_s.so.1", "libstdc++.so.6"})
"""The run-time libraries of GCC: the machine has them, an environment may bring newer ones."""
PROMISED = GLIBC | GCC
"""What PEP 600 lets every wheel take for granted, and whose symbols all have versions."""

_DRIVER = re.compile(
    r"lib(cuda|nvcuvid|nvoptix|cudadebugger|nvidia-[a-z0-9-]+|GLX_nvidia|EGL_nvidia)\.so\..*"
)
_STEM = re.compile(r"(lib.+?)\.so(?:\.(\d+))?(?:\.|$)")

_X11 = "X11 X11-xcb Xext Xrender Xft Xss Xt Xi Xtst Xfixes Xrandr Xcursor Xdamage Xcomposite"
_X11 += " Xau Xdmcp Xinerama Xmu ICE SM xkbcommon xkbcommon-x11"
_GL = ("GL", "GLX", "EGL", "OpenGL", "GLdispatch", "GLESv2", "GLU", "gbm", "drm", "vulkan")
_GLIB = ("glib-2.0", "gobject-2.0", "gthread-2.0", "gio-2.0", "gmodule-2.0")
_GTK = ("gtk-3", "gdk-3", "atk-1.0", "pango-1.0", "pangocairo-1.0", "cairo", "gdk_pixbuf-2.0")
_NCURSES = ("ncurses", "ncursesw", "tinfo", "tinfow", "panel", "panelw", "form", "menu")
_KERBEROS = ("gssapi_krb5", "krb5", "k5crypto", "krb5support", "com_err")
_RDMA = ("ibverbs", "rdmacm", "mlx4", "mlx5", "efa")
_UCX = ("ucp", "ucs", "uct", "ucm")
_FFMPEG = ("avcodec", "avformat", "avutil", "avfilter", "avdevice", "swscale", "swresample")
_MPI = ("mpi", "mpicxx", "mpifort", "mpi_mpifh", "mpich", "open-rte", "open-pal", "pmix", "fabric")

MACHINE = {
    **{f"lib{name}": "xorg libraries" for name in _X11.split()},
    **{f"lib{name}": "libgl" for name in _GL},
    **{f"lib{name}": "glib" for name in _GLIB},
    **{f"lib{name}": "gtk3" for name in _GTK},
    **{f"lib{name}": "ncurses" for name in _NCURSES},
    **{f"lib{name}": "krb5" for name in _KERBEROS},
    **{f"lib{name}": "rdma-core" for name in _RDMA},
    **{f"lib{name}": "ucx" for name in _UCX},
    **{f"lib{name}": "ffmpeg" for name in _FFMPEG},
    **{f"lib{name}": "mpich or openmpi" for name in _MPI},
    "libOpenCL": "ocl-icd",
    "libasound": "alsa-lib",
    "libatomic": "libatomic",
    "libaio": "libaio",
    "libblas": "libblas",
    "libbz2": "bzip2",
    "libcap": "libcap",
    "libcrypt": "libxcrypt",
    "libcrypto": "openssl",
    "libcurl": "libcurl",
    "libdb-5.3": "libdb",
    "libdbus-1": "dbus",
    "libdw": "elfutils",
    "libelf": "elfutils",
    "libexpat": "libexpat",
    "libffi": "libffi",
    "libfontconfig": "fontconfig",
    "libfreetype": "freetype",
    "libgdbm": "gdbm",
    "libgdbm_compat": "gdbm",
    "libgfortran": "libgfortran",
    "libgmp": "gmp",
    "libgomp": "libgomp",
    "libhistory": "readline",
    "libjpeg": "libjpeg-turbo",
    "liblapack": "liblapack",
    "liblz4": "lz4-c",
    "liblzma": "liblzma",
    "libmariadb": "mariadb-connector-c",
    "libmysqlclient": "mysql-libs",
    "libnsl": "libnsl",
    "libnspr4": "nspr",
    "libnss3": "nss",
    "libnssutil3": "nss",
    "libnuma": "libnuma",
    "libodbc": "unixodbc",
    "libpcre2-8": "pcre2",
    "libpng16": "libpng",
    "libpq": "libpq",
    "libpulse": "pulseaudio-client",
    "libquadmath": "libquadmath",
    "libreadline": "readline",
    "libselinux": "libselinux",
    "libsqlite3": "libsqlite",
    "libssl": "openssl",
    "libsystemd": "libsystemd",
    "libtbb": "tbb",
    "libtcl8.6": "tk",
    "libtirpc": "libtirpc",
    "libtk8.6": "tk",
    "libudev": "libudev",
    "libuuid": "libuuid",
    "libwayland-client": "wayland",
    "libwayland-cursor": "wayland",
    "libwayland-egl": "wayland",
    "libxml2": "libxml2",
    "libxslt": "libxslt",
    "libz": "libzlib",
    "libzstd": "zstd",
}
"""Libraries that packages commonly expect of the system, and the conda package that has them.

They are on most machines and missing in slim container images, or serve a part of a package
that few use: nothing to refuse an environment for.
"""

CUDA = {
    "libcudart": ("cuda-cudart", "nvidia-cuda-runtime"),
    "libcublas": ("libcublas", "nvidia-cublas"),
    "libcublasLt": ("libcublas", "nvidia-cublas"),
    "libcudnn": ("cudnn", "nvidia-cudnn"),
    "libcufft": ("libcufft", "nvidia-cufft"),
    "libcufile": ("libcufile", "nvidia-cufile"),
    "libcupti": ("cuda-cupti", "nvidia-cuda-cupti"),
    "libcurand": ("libcurand", "nvidia-curand"),
    "libcusolver": ("libcusolver", "nvidia-cusolver"),
    "libcusparse": ("libcusparse", "nvidia-cusparse"),
    "libcusparseLt": ("cusparselt", "nvidia-cusparselt"),
    "libnccl": ("nccl", "nvidia-nccl"),
    "libnvJitLink": ("libnvjitlink", "nvidia-nvjitlink"),
    "libnvToolsExt": ("cuda-nvtx", "nvidia-nvtx"),
    "libnvjpeg": ("libnvjpeg", "nvidia-nvjpeg"),
    "libnvrtc": ("cuda-nvrtc", "nvidia-cuda-nvrtc"),
    "libnvshmem_host": ("libnvshmem3", "nvidia-nvshmem"),
}
"""Libraries of the CUDA toolkit: the conda package and the PyPI project that have them."""
_NUMBERED_AS_CUDA = frozenset({"libcudart", "libcublas", "libcublasLt", "libnvrtc", "libnvJitLink"})

_OTHERS = {
    "libmkl_rt": ("mkl", "mkl"),
    "libiomp5": ("intel-openmp", "intel-openmp"),
    "libomp": ("llvm-openmp", ""),
    "libopenblas": ("libopenblas", ""),
    "libcblas": ("libcblas", ""),
    "libarrow": ("libarrow", "pyarrow"),
    "libhdf5": ("hdf5", ""),
    "libgdal": ("libgdal", ""),
    "libproj": ("proj", ""),
    "libgeos_c": ("geos", ""),
    "libicuuc": ("icu", ""),
    "libicui18n": ("icu", ""),
    "libicudata": ("icu", ""),
    "libtorch": ("libtorch", "torch"),
    "libtorch_cpu": ("libtorch", "torch"),
    "libtorch_cuda": ("libtorch", "torch"),
    "libtorch_python": ("pytorch", "torch"),
    "libc10": ("libtorch", "torch"),
    "libnvinfer": ("tensorrt", "tensorrt"),
    "libprotobuf": ("libprotobuf", ""),
}


def stem_of(soname: str) -> str:
    """``libfoo`` of ``libfoo.so.1``; a name of another form is its own stem."""
    match = _STEM.match(soname)
    return match[1] if match else soname


def major_of(soname: str) -> int | None:
    """``12`` of ``libcudart.so.12``, ``None`` for a library that has no number."""
    match = _STEM.match(soname)
    return int(match[2][:6]) if match and match[2] else None


def is_driver(soname: str) -> bool:
    """Whether a library comes with the NVIDIA driver, which is never part of an environment."""
    return _DRIVER.fullmatch(soname) is not None


def providers(soname: str) -> str:
    """Return which packages have a library, in words, empty if that is not known."""
    stem, major = stem_of(soname), major_of(soname)
    if stem in CUDA:
        conda, pypi = CUDA[stem]
        if stem in _NUMBERED_AS_CUDA and major is not None:
            # Before CUDA 13 every major version had projects of its own.
            pypi += f"-cu{major}" if major < 13 else ""
        else:
            pypi += "-cuNN"
        return f"{conda} (conda) or {pypi} (PyPI)"
    if stem in _OTHERS:
        conda, pypi = _OTHERS[stem]
        return f"{conda} (conda)" + (f" or {pypi} (PyPI)" if pypi else "")
    if re.fullmatch(r"libpython3\.\d+t?", stem):
        return "python (conda)"
    if stem in MACHINE or is_xcb(stem):
        return f"{MACHINE.get(stem, 'xorg libraries')} (conda)"
    if soname in GCC:
        return "libgcc (conda)" if soname == "libgcc_s.so.1" else "libstdcxx (conda)"
    return ""


def is_xcb(stem: str) -> bool:
    """Whether this is one of the two dozen libraries of XCB."""
    return stem == "libxcb" or stem.startswith("libxcb-")


def of_machine(soname: str) -> bool:
    """Whether packages commonly expect this library of the system."""
    stem = stem_of(soname)
    return stem in MACHINE or is_xcb(stem) or is_driver(soname)


@functools.cache
def glibc_symbols() -> frozenset[str]:
    """Return what the libraries of ``GLIBC`` define for others, whatever the version.

    From the dynamic symbol tables of glibc 2.36 on x86-64, without ``GLIBC_PRIVATE``. Only names
    that a file wants without saying the version are looked up here: it was linked carelessly.
    """
    return frozenset((files(__package__) / "glibc_symbols.txt").read_text("ascii").split())


_RUN_TIME = re.compile(
    r"_ZN?K?S[t-]|_ZN?K?S[absiod]|_ZT[ISV]|_Z[nd][aw]|_ZN10__cxxabiv|_ZGVNSt|_ZSt"
    r"|__cxa_|__gxx_|_Unwind_|__dynamic_cast|__emutls|__gcc_personality|__register_frame"
    r"|__deregister_frame|__(u?div|u?mod|mul|add|sub|neg|ashl|ashr|lshr|cmp|ucmp)[a-z]*[dt]i[234]"
)


def is_run_time(symbol: str) -> bool:
    """Whether a symbol looks like one of GCC's run-time libraries."""
    return _RUN_TIME.match(symbol) is not None
