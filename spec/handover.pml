/* The handover of one VM (spec/handover.md), for spin: NVA, old NVE, new NVE and two peers, with
 * lost messages, repeated orders, crashes of any daemon and an abort at any moment.
 *
 *   spin -a handover.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m100000
 *
 * What is left out: frames (the simulation carries them) and time (a tick is "nothing else can
 * happen"). A crash takes along what was not written: orders and reports under way. Records, parts
 * and copies of the VM outlive it. An order that is overwritten before it is read is a lost order.
 *
 * Each change of phase is one `enter(FROM, TO)`: a test compares them with the coordinator's code.
 */

#ifndef LOSSES
#define LOSSES 2
#endif
#ifndef CRASHES
#define CRASHES 2
#endif

#define OLD 0
#define NEW 1
#define PEER1 2
#define PEER2 3
#define ALL 4

mtype:Phase = { planned, precopy, paused, equal, committed, converging, drained, closed, aborting,
                aborted };
mtype:Copy = { none, runs, stopped, incoming, whole };
mtype:Word = { nothing, prepare, send, steer, steer_back, activate, retire, push, give_back,
               restore, close,
               prepared, flowing, stands, received, steered, running, acknowledged, given_back,
               restored, turned_back, is_closed, failed };

mtype:Phase phase = planned;      /* the NVA's record, and all that it journals */
byte home = OLD;
bool has_prepared[ALL], has_steered[ALL], has_acknowledged[ALL], has_turned_back[ALL],
     has_closed[ALL];
bool is_flowing, is_stopped, is_received, is_running, is_given_back, is_restored, is_closing;

mtype:Copy copy[ALL];             /* what QEMU holds on each host */
bool retired;                     /* the old NVE's part, on its disk */
byte table[ALL] = OLD;            /* where each NVE sends frames for the VM */

mtype:Word order[ALL];
chan up = [3] of { mtype:Word, byte };
byte losses, crashes;

#define enter(FROM, TO) assert(phase == FROM); phase = TO
#define tell(N, WORD)   order[N] = WORD
#define say(WORD, N)    if :: nfull(up) -> up!WORD, N :: full(up) -> skip fi
#define one_runs        !(copy[OLD] == runs && copy[NEW] == runs)
#define in_place        (copy[OLD] != runs || home == OLD) && (copy[NEW] != runs || home == NEW)
#define forget()        said = nothing; nve = 0 /* fewer states: nobody looks at them again */
#define safe()          assert(one_runs); assert(in_place)
#define peers(WHAT)     WHAT[PEER1] && WHAT[PEER2]
#define every(WHAT)     WHAT[OLD] && WHAT[NEW] && peers(WHAT)

/* What the present phase waits for is asked (again); nobody has to know what arrived (HO-20). */
inline ask() {
  if
  :: phase == planned ->
     if
     :: !has_prepared[NEW] -> tell(NEW, prepare)
     :: has_prepared[NEW] ->
        if :: !has_prepared[OLD] -> tell(OLD, prepare) :: else fi;
        if :: !has_prepared[PEER1] -> tell(PEER1, prepare) :: else fi;
        if :: !has_prepared[PEER2] -> tell(PEER2, prepare) :: else fi
     fi
  :: phase == precopy || phase == paused ->
     if :: phase == precopy -> tell(OLD, send) :: else fi;
     if :: is_flowing && !(has_steered[NEW] && is_received) -> tell(NEW, steer) :: else fi;
     ask_peers_to_steer()
  :: phase == equal -> skip
  :: phase == committed -> tell(NEW, activate); tell(OLD, retire); ask_peers_to_steer()
  :: phase == converging ->
     if :: !has_acknowledged[OLD] -> tell(OLD, push) :: else fi;
     if :: !has_acknowledged[NEW] -> tell(NEW, push) :: else fi;
     if :: !has_acknowledged[PEER1] -> tell(PEER1, push) :: else fi;
     if :: !has_acknowledged[PEER2] -> tell(PEER2, push) :: else fi
  :: phase == drained || (phase == aborting && is_closing) ->
     if :: !has_closed[OLD] -> tell(OLD, close) :: else fi;
     if
     :: !has_closed[NEW] && (has_closed[OLD] || phase == aborting) -> tell(NEW, close)
     :: else
     fi;
     if :: !has_closed[PEER1] -> tell(PEER1, close) :: else fi;
     if :: !has_closed[PEER2] -> tell(PEER2, close) :: else fi
  :: phase == aborting && !is_closing ->
     if
     :: !is_given_back -> tell(NEW, give_back)
     :: is_given_back && !is_restored -> tell(OLD, restore)
     :: else ->
        if :: !has_turned_back[PEER1] -> tell(PEER1, steer_back) :: else fi;
        if :: !has_turned_back[PEER2] -> tell(PEER2, steer_back) :: else fi
     fi
  fi
}

inline ask_peers_to_steer() {
  if
  :: has_steered[NEW] ->
     if :: !has_steered[PEER1] -> tell(PEER1, steer) :: else fi;
     if :: !has_steered[PEER2] -> tell(PEER2, steer) :: else fi
  :: else
  fi
}

/* From what is known to the next phase; passed through as far as it goes. */
inline advance() {
  if :: phase == planned && every(has_prepared) -> enter(planned, precopy) :: else fi;
  if :: phase == precopy && is_stopped -> enter(precopy, paused) :: else fi;
  if :: phase == paused && is_received && has_steered[NEW] -> enter(paused, equal) :: else fi;
  if
  :: phase == equal -> enter(equal, committed); home = NEW /* one compare-and-set */
  :: phase == equal -> enter(equal, aborting) /* which met another version */
  :: else
  fi;
  if :: phase == committed && is_running -> enter(committed, converging) :: else fi;
  if :: phase == converging && every(has_acknowledged) -> enter(converging, drained) :: else fi;
  if :: phase == drained && every(has_closed) -> enter(drained, closed) :: else fi;
  if
  :: phase == aborting && is_restored && (!has_steered[NEW] || peers(has_turned_back)) ->
     is_closing = true
  :: else
  fi;
  if
  :: phase == aborting && is_closing && every(has_closed) -> enter(aborting, aborted)
  :: else
  fi
}

inline turn_back() {
  if
  :: phase == planned -> enter(planned, aborting)
  :: phase == precopy -> enter(precopy, aborting)
  :: phase == paused -> enter(paused, aborting)
  :: else -> skip /* only forward, or on the way back already */
  fi
}

inline hear(word, nve) {
  if
  :: word == prepared -> has_prepared[nve] = true
  :: word == flowing -> is_flowing = true
  :: word == stands -> is_flowing = true; is_stopped = true
  :: word == received -> is_received = true
  :: word == steered -> has_steered[nve] = true
  :: word == running -> is_running = true
  :: word == acknowledged -> has_acknowledged[nve] = true
  :: word == given_back -> if :: phase == aborting -> is_given_back = true :: else fi
  :: word == restored -> if :: phase == aborting -> is_restored = true :: else fi
  :: word == turned_back -> has_turned_back[nve] = true
  :: word == is_closed -> if :: is_closing || phase == drained -> has_closed[nve] = true :: else fi
  :: word == failed -> turn_back()
  fi
}

active proctype nva() {
  mtype:Word said;
  byte nve;
  atomic { ask() };
  do
  :: atomic { (phase == closed || phase == aborted) -> break }
  :: atomic { up?said, nve ->
       hear(said, nve); advance();
       if :: phase != closed && phase != aborted -> ask() :: else fi;
       safe();
       forget()
     }
  :: atomic { losses < LOSSES && nempty(up) -> up?said, nve; losses++; forget() }
  :: atomic { phase == planned || phase == precopy || phase == paused -> turn_back(); ask() }
  :: atomic { crashes < CRASHES && phase != closed && phase != aborted -> /* NVA dies, is back */
       crashes++;
       do :: up?said, nve :: empty(up) -> break od;
       forget();
       if :: phase == paused -> turn_back() :: else fi; /* it may have turned back before (HO-68) */
       ask()
     }
  :: atomic { timeout -> ask() } /* a tick: nothing else can happen */
  od;
  atomic {
    safe();
    if
    :: phase == closed -> assert(copy[NEW] == runs && copy[OLD] == none);
       assert(table[OLD] == NEW && table[PEER1] == NEW && table[PEER2] == NEW)
    :: else -> assert(copy[OLD] == runs && copy[NEW] == none);
       assert(table[OLD] == OLD && table[PEER1] == OLD && table[PEER2] == OLD)
    fi
  }
}

active proctype old_nve() {
  copy[OLD] = runs;
end:
  do
  :: atomic { order[OLD] == prepare -> order[OLD] = nothing; say(prepared, OLD) }
  :: atomic { order[OLD] == send -> order[OLD] = nothing;
       if
       :: copy[OLD] == runs -> say(flowing, OLD)
       :: else -> say(stands, OLD)
       fi
     };
     if
     :: atomic { copy[OLD] == runs -> copy[OLD] = stopped; say(stands, OLD) }
     :: atomic { copy[OLD] != runs -> skip }
     :: atomic { crashes < CRASHES -> crashes++; say(failed, OLD) } /* how far it came is unknown */
     fi;
     if
     :: atomic { copy[OLD] == stopped && copy[NEW] == incoming -> copy[NEW] = whole }
     :: atomic { !(copy[OLD] == stopped && copy[NEW] == incoming) -> skip }
     fi
  :: atomic { order[OLD] == restore -> order[OLD] = nothing;
       if
       :: !retired -> copy[OLD] = runs; table[OLD] = OLD; say(restored, OLD)
       :: else
       fi;
       safe()
     }
  :: atomic { order[OLD] == retire -> order[OLD] = nothing; retired = true }
  :: atomic { order[OLD] == push -> order[OLD] = nothing; say(acknowledged, OLD) }
  :: atomic { order[OLD] == close -> order[OLD] = nothing;
       if
       :: home == NEW -> retired = true; table[OLD] = NEW; copy[OLD] = none
       :: else
       fi;
       say(is_closed, OLD)
     }
  :: atomic { order[OLD] != nothing && losses < LOSSES -> losses++; order[OLD] = nothing }
  :: atomic { order[OLD] != nothing && crashes < CRASHES -> crashes++; order[OLD] = nothing }
  od
}

active proctype new_nve() {
  bool has_said;
  copy[NEW] = none;
end:
  do
  :: atomic { order[NEW] == prepare -> order[NEW] = nothing;
       if :: copy[NEW] == none -> copy[NEW] = incoming :: else fi;
#ifdef BUG_RUN_EARLY
       copy[NEW] = runs;
#endif
       safe();
       say(prepared, NEW)
     }
  :: atomic { order[NEW] == steer -> order[NEW] = nothing; table[NEW] = NEW; say(steered, NEW);
       if :: copy[NEW] == whole -> say(received, NEW) :: else fi
     }
  :: atomic { copy[NEW] == whole && !has_said -> has_said = true; say(received, NEW) }
  :: atomic { order[NEW] == activate -> order[NEW] = nothing;
       if :: copy[NEW] == whole -> copy[NEW] = runs :: else fi;
       if :: copy[NEW] == runs -> say(running, NEW) :: else fi;
       safe()
     }
  :: atomic { order[NEW] == push -> order[NEW] = nothing; say(acknowledged, NEW) }
  :: atomic { order[NEW] == give_back -> order[NEW] = nothing; copy[NEW] = none; table[NEW] = OLD;
       say(given_back, NEW)
     }
  :: atomic { order[NEW] == close -> order[NEW] = nothing;
       if :: copy[NEW] != runs -> copy[NEW] = none; table[NEW] = OLD :: else fi;
       say(is_closed, NEW)
     }
  :: atomic { order[NEW] != nothing && losses < LOSSES -> losses++; order[NEW] = nothing }
  :: atomic { order[NEW] != nothing && crashes < CRASHES -> crashes++; order[NEW] = nothing;
       if :: copy[NEW] == incoming && phase == planned -> say(failed, NEW) :: else fi
     }
  od
}

proctype peer_nve(byte me) {
end:
  do
  :: atomic { order[me] == prepare -> order[me] = nothing; say(prepared, me) }
  :: atomic { order[me] == steer -> order[me] = nothing; table[me] = NEW; say(steered, me) }
  :: atomic { order[me] == steer_back -> order[me] = nothing; table[me] = OLD;
       say(turned_back, me) }
  :: atomic { order[me] == push -> order[me] = nothing; table[me] = home; say(acknowledged, me) }
  :: atomic { order[me] == close -> order[me] = nothing; say(is_closed, me) }
  :: atomic { order[me] != nothing && losses < LOSSES -> losses++; order[me] = nothing }
  od
}

init { atomic { run peer_nve(PEER1); run peer_nve(PEER2) } }
