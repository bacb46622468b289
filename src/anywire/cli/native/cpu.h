/* The CPU time of another process, for the load generators. */
#include <dirent.h>
#include <stdio.h>

/* Seconds of all its threads, from /proc/PID/task/.../schedstat (nanoseconds); 0 for process 0. */
static double server_cpu(int pid) {
    char name[320];
    double seconds = 0;
    snprintf(name, sizeof name, "/proc/%d/task", pid);
    DIR *tasks = pid ? opendir(name) : NULL;
    for (struct dirent *task; tasks && (task = readdir(tasks));) {
        unsigned long long ns;
        if (task->d_name[0] == '.') continue;
        snprintf(name, sizeof name, "/proc/%d/task/%s/schedstat", pid, task->d_name);
        FILE *file = fopen(name, "r");
        if (file && fscanf(file, "%llu", &ns) == 1) seconds += (double)ns / 1e9;
        if (file) fclose(file);
    }
    if (tasks) closedir(tasks);
    return seconds;
}
