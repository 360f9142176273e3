/* Writes numbered records that must outlast everything: journal DEVICE WRITES_PER_S ACKNOWLEDGED
 *
 * Record n goes to sector 1024 + n, for good, and to sector n % 64, over an older one: so a write
 * that is lost leaves a gap, and one that is repeated brings an old number back. Each write is on
 * the disk (O_DSYNC) before the next is begun; the file ACKNOWLEDGED has the last number of which
 * both were. Nothing is cached here (O_DIRECT). Ends with status 1 and the reason on stderr. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR = 512, RING = 64, FIRST = 1024 };

int main(int argc, char **argv) {
  if (argc < 4) return 2;
  int disk = open(argv[1], O_RDWR | O_DIRECT | O_DSYNC), told = open(argv[3], O_WRONLY | O_CREAT, 0644);
  long pause_ns = 2000000000L / atol(argv[2]);
  uint64_t *record = aligned_alloc(4096, 4096);
  struct timespec next;
  if (disk < 0 || told < 0 || !record) return perror(argv[1]), 1;
  clock_gettime(CLOCK_MONOTONIC, &next);
  for (uint64_t number = 1;; number++) {
    for (int word = 0; word < SECTOR / 8; word++) record[word] = number;
    if (pwrite(disk, record, SECTOR, (FIRST + (off_t)number) * SECTOR) != SECTOR ||
        pwrite(disk, record, SECTOR, (off_t)(number % RING) * SECTOR) != SECTOR ||
        pwrite(told, &number, sizeof number, 0) != sizeof number)
      return perror("journal"), 1;
    next.tv_nsec += pause_ns;
    for (; next.tv_nsec >= 1000000000L; next.tv_nsec -= 1000000000L) next.tv_sec++;
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
  }
}
