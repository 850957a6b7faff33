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

ALLOWED = frozenset({"libz.so.1", "libexpat.so.1"})
"""Further libraries that wheels of the manylinux kind may expect, and Python needs itself."""

_DRIVER = re.compile(
    r"lib(cuda|nvcuvid|nvoptix|cudadebugger|nvidia-[a-z0-9-]+|GLX_nvidia|EGL_nvidia)\.so\..*"
)
_STEM = re.compile(r"(lib.+?)\.so(?:\.(\d+))?(?:\.|$)")

_OF_CONDA = {
    "alsa-lib": "asound",
    "brotli": "brotlicommon brotlidec brotlienc",
    "bzip2": "bz2",
    "libcurl": "curl",
    "dbus": "dbus-1",
    "elfutils": "elf dw",
    "ffmpeg": "avcodec avformat avutil avfilter avdevice swscale swresample",
    "fftw": "fftw3 fftw3f fftw3_threads fftw3f_threads",
    "fontconfig": "fontconfig",
    "freetype": "freetype",
    "fribidi": "fribidi",
    "gdbm": "gdbm gdbm_compat",
    "glib": "glib-2.0 gobject-2.0 gthread-2.0 gio-2.0 gmodule-2.0",
    "gmp": "gmp gmpxx",
    "gnutls": "gnutls nettle hogweed tasn1 p11-kit",
    "gsl": "gsl gslcblas",
    "gtk3": "gtk-3 gdk-3 atk-1.0 pango-1.0 pangocairo-1.0 pangoft2-1.0 cairo gdk_pixbuf-2.0",
    "harfbuzz": "harfbuzz graphite2",
    "keyutils": "keyutils",
    "krb5": "gssapi_krb5 krb5 k5crypto krb5support com_err",
    "libaio": "aio",
    "libarchive": "archive",
    "libatomic": "atomic",
    "libblas": "blas cblas",
    "libcap": "cap",
    "libcups": "cups",
    "libdb": "db-5.3",
    "libevent": "event event-2.1 event_core-2.1 event_pthreads-2.1",
    "libexpat": "expat",
    "libffi": "ffi",
    "libgfortran": "gfortran",
    "libgl": "GL GLX EGL OpenGL GLdispatch GLESv2 GLU gbm drm vulkan",
    "libgomp": "gomp",
    "libheif": "heif",
    "libhwloc": "hwloc",
    "libidn2": "idn2 unistring psl",
    "libjpeg-turbo": "jpeg turbojpeg",
    "liblapack": "lapack lapacke",
    "liblzma": "lzma",
    "libnl": "nl-3 nl-genl-3 nl-route-3",
    "libnsl": "nsl",
    "libnuma": "numa",
    "libpng": "png16",
    "libpq": "pq",
    "libquadmath": "quadmath",
    "libselinux": "selinux",
    "libsndfile": "sndfile FLAC vorbis vorbisenc ogg opus mp3lame mpg123",
    "libsqlite": "sqlite3",
    "libssh2": "ssh2 ssh",
    "libsystemd": "systemd",
    "libtiff": "tiff",
    "libtirpc": "tirpc",
    "libudev": "udev",
    "libusb": "usb-1.0",
    "libuuid": "uuid",
    "libuv": "uv",
    "libwebp": "webp webpdemux webpmux sharpyuv",
    "libxcrypt": "crypt",
    "libxml2": "xml2",
    "libxslt": "xslt exslt",
    "libzip": "zip",
    "libzlib": "z",
    "lz4-c": "lz4",
    "mariadb-connector-c": "mariadb",
    "mpfr": "mpfr mpc",
    "mpich or openmpi": "mpi mpicxx mpifort mpi_mpifh mpi_cxx mpich open-rte open-pal oshmem pmix",
    "mysql-libs": "mysqlclient",
    "ncurses": "ncurses ncursesw tinfo tinfow panel panelw form formw menu menuw",
    "nghttp2": "nghttp2",
    "nss": "nss3 nssutil3 smime3 nspr4 plc4 plds4",
    "ocl-icd": "OpenCL",
    "openldap": "ldap ldap-2.4 ldap-2.5 lber lber-2.4 lber-2.5 sasl2",
    "openssl": "ssl crypto",
    "pcre2": "pcre2-8 pcre2-16",
    "portaudio": "portaudio jack",
    "pulseaudio-client": "pulse pulse-simple",
    "rdma-core": "ibverbs rdmacm mlx4 mlx5 efa fabric",
    "readline": "readline history",
    "speechd": "speechd",
    "tbb": "tbb tbbmalloc",
    "tk": "tcl8.6 tk8.6",
    "ucx": "ucp ucs uct ucm",
    "unixodbc": "odbc odbcinst",
    "wayland": "wayland-client wayland-cursor wayland-egl wayland-server",
    "xorg libraries": "X11 X11-xcb Xext Xrender Xft Xss Xt Xi Xtst Xfixes Xrandr Xcursor Xdamage "
    "Xcomposite Xau Xdmcp Xinerama Xmu ICE SM xkbcommon xkbcommon-x11",
    "yaml": "yaml",
    "zstd": "zstd",
}
MACHINE = {f"lib{stem}": conda for conda, stems in _OF_CONDA.items() for stem in stems.split()}
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
    "libc10_cuda": ("libtorch", "torch"),
    "libnvinfer": ("tensorrt", "tensorrt"),
    "libprotobuf": ("libprotobuf", ""),
}


@functools.lru_cache(1 << 16)
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


# Mangled names of what is in std, __gnu_cxx or __cxxabiv1, with vtables, type information and
# thunks; operators new and delete; types that the language itself has; what compilers call.
_RUN_TIME = re.compile(
    r"_Z(T[ISVTCW]|Thn?\d+_|Tvn?\d+_n?\d+_|GV|GR|GTt)?N?[KVrRO]*(S[tabsiod]|9__gnu_cxx|10__cxxabiv1)"
    r"|_Z(nw|na|dl|da)|_ZT[IS]P?K?[a-z]$|__cxa_|__gxx_|__dynamic_cast|_Unwind_|__emutls"
    r"|__gcc_personality|__(de)?register_frame|__atomic_|__cpu_|__clear_cache$"
    r"|__[a-z]+(hi|si|di|ti|hf|sf|df|tf|xf|hc|sc|dc|tc|xc)\d?$"
)
_DRIVERS = re.compile(r"cu[A-Z]|nvml[A-Z]")


def is_run_time(symbol: str) -> bool:
    """Whether a symbol looks like one of GCC's run-time libraries."""
    return _RUN_TIME.match(symbol) is not None


def is_drivers(symbol: str) -> bool:
    """Whether a symbol looks like one of the NVIDIA driver's libraries."""
    return _DRIVERS.match(symbol) is not None
