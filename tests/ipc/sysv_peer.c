/* The other side of the System V objects, by the C library's functions alone. Prints what it got; exits with errno. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

struct message { long type; char bytes[8192]; };
union semun { int val; struct semid_ds *buf; unsigned short *array; };

static int check(long done) {
    if (done < 0) { perror("sysv_peer"); exit(errno); }
    return (int) done;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    key_t key = argc > 2 ? (key_t) strtol(argv[2], NULL, 0) : 0;
    long n = argc > 3 ? strtol(argv[3], NULL, 0) : 0;
    struct message m;
    if (!strcmp(what, "ftok")) {
        printf("%d\n", (int) ftok(argv[2], (int) n));
    } else if (!strcmp(what, "send")) {                 /* key, type, text */
        m.type = n;
        strcpy(m.bytes, argv[4]);
        check(msgsnd(check(msgget(key, 0)), &m, strlen(argv[4]), 0));
    } else if (!strcmp(what, "recv")) {                 /* key, type */
        int got = check(msgrcv(check(msgget(key, 0)), &m, sizeof m.bytes, n, 0));
        printf("%ld %.*s\n", m.type, got, m.bytes);
    } else if (!strcmp(what, "echo")) {                 /* key, type: sends what comes back as type + 1, until it is empty */
        int id = check(msgget(key, 0)), got;
        while ((got = check(msgrcv(id, &m, sizeof m.bytes, n, 0))) > 0) {
            m.type = n + 1;
            check(msgsnd(id, &m, got, 0));
        }
    } else if (!strcmp(what, "semget")) {               /* key, number: creates, and initialises as Stevens says, slowly */
        int i, id = check(semget(key, (int) n, IPC_CREAT | IPC_EXCL | 0600));
        struct sembuf up = { 0, 1, 0 };
        puts("made"); fflush(stdout); getchar();
        for (i = 1; i < n; i++) check(semctl(id, i, SETVAL, (union semun) { .val = i + 1 }));
        puts("set"); fflush(stdout); getchar();
        check(semop(id, &up, 1));
    } else if (!strcmp(what, "semop")) {                /* key, index, change */
        struct sembuf op = { (unsigned short) n, (short) atoi(argv[4]), IPC_NOWAIT };
        check(semop(check(semget(key, 0, 0)), &op, 1));
    } else if (!strcmp(what, "semval")) {               /* key, index */
        printf("%d\n", check(semctl(check(semget(key, 0, 0)), (int) n, GETVAL)));
    } else if (!strcmp(what, "shm")) {                  /* key, offset, text: prints what was there */
        size_t length = strlen(argv[4]);
        char *at = shmat(check(shmget(key, 0, 0)), NULL, 0);
        check(at == (char *) -1 ? -1 : 0);
        printf("%.*s\n", (int) length, at + n);
        memcpy(at + n, argv[4], length);
        check(shmdt(at));
    } else {
        return 2;
    }
    return 0;
}
