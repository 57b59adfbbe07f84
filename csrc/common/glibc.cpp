// libstdc++'s headers refer to this variable of glibc 2.32, which older systems lack. Zero: references to shared
// objects are counted atomically, as if there were always threads.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
